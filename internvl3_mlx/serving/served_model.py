"""One model of an engine: loaded when it is asked for, with the answers that it is giving."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from internvl3_mlx.generation.decode_batch import DecodeBatch
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.serving.image_features import vision_fingerprint
from internvl3_mlx.serving.prefill_task import PrefillTask
from internvl3_mlx.serving.running_answer import RunningAnswer
from internvl3_mlx.serving.status import ModelStatus


@dataclass(frozen=True, eq=False)
class LoadedParts:
    """A model in memory. fingerprint: of what computes its image features.

    bits: of the language model's weights, None where they are not quantized.
    """

    runner: ModelRunner
    decode: DecodeBatch[RunningAnswer]
    fingerprint: str
    parameters: int
    bits: int | None
    created: int


@dataclass(eq=False)
class ServedModel:
    """A name that requests may give. load: loads it, in the worker's thread.

    last_used: on the monotonic clock.
    """

    name: str
    load_runner: Callable[[], ModelRunner]
    parts: LoadedParts | None = None
    prefills: deque[PrefillTask] = field(default_factory=deque[PrefillTask])
    last_used: float = field(default_factory=time.monotonic)
    known_nbytes: int = 0

    def load(self) -> LoadedParts:
        """Load the model unless it is in memory."""
        self.last_used = time.monotonic()
        if self.parts is None:
            runner = self.load_runner()
            self.parts = LoadedParts(
                runner,
                DecodeBatch[RunningAnswer].for_model(runner.model),
                vision_fingerprint(runner.model),
                count_parameters(runner.model),
                weight_bits(runner.model),
                int(time.time()),
            )
            self.known_nbytes = runner.weights_nbytes
        return self.parts

    def put_away(self) -> None:
        """Free the weights."""
        self.parts = None
        mx.clear_cache()

    @property
    def is_busy(self) -> bool:
        return bool(self.prefills) or bool(self.parts and self.parts.decode.answers)

    @property
    def num_rows(self) -> int:
        """Answers that are decoded, and those that will be once their prompts are read."""
        decoding = len(self.parts.decode.answers) if self.parts else 0
        return decoding + sum(task.num_answers for task in self.prefills)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.parts.runner.weights_nbytes if self.parts else 0

    def status(self, idle_timeout_s: float | None) -> ModelStatus:
        parts = self.parts
        if parts is None:
            return ModelStatus(self.name)
        config = parts.runner.config
        expires_at = None
        if idle_timeout_s is not None and not self.is_busy:
            expires_at = time.time() + self.last_used + idle_timeout_s - time.monotonic()
        return ModelStatus(
            self.name,
            loaded=True,
            created=parts.created,
            nbytes=self.nbytes,
            context_length=config.text.max_position_embeddings,
            max_tiles=config.max_dynamic_patch,
            tile_size=config.force_image_size,
            parameters=parts.parameters,
            bits=parts.bits,
            expires_at=expires_at,
        )


def count_parameters(model: InternVL) -> int:
    """Return how many numbers a model's weights are; packed ones count by their words."""
    parameters: Any = tree_flatten(model.parameters())
    return sum(int(array.size) for _, array in parameters)


def weight_bits(model: InternVL) -> int | None:
    modules: Any = model.language_model.named_modules()
    return next((int(module.bits) for _, module in modules if hasattr(module, "bits")), None)
