"""A smaller model that drafts, with a prompt cache of its own that lives as long as the other's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prefill import Prefill, open_prefill
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.sampler import (
    Sampler,
    SamplingParams,
    choose_seed,
    draw_tokens,
    split_keys,
)
from internvl3_mlx.generation.speculative import Draft
from internvl3_mlx.models.internvl import InternVL


class DraftReader(Protocol):
    """A model that has read the prompt and reads what follows."""

    def readable(self, ids: Sequence[int]) -> list[int]:
        """Return those of the ids that this model knows."""
        ...

    def read(self, tokens: mx.array) -> mx.array:
        """Read tokens, (L,) -> logits (1, V) of the next one, over tokens that both models have."""
        ...

    def rewind(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        ...

    def close(self, generated_ids: Sequence[int]) -> None:
        """Keep the prompt and ``generated_ids`` for the next question."""
        ...


@dataclass(eq=False)
class DraftModel:
    """Drafts with a smaller model; nothing waits for the drafted tokens.

    open_reader: lets the model read the prompt, at the first draft; often there is none.
    cost: of a drafted token, in steps of the model that verifies; decoding is bound by the bytes of
    the weights that are read. prompt_length: tokens of the prompt that is verified. num_right:
    tokens of prompt and answer that the reader has read, all of them right. num_unsure: drafted
    tokens that it has read since.
    """

    open_reader: Callable[[], DraftReader]
    config: GenerationConfig
    prompt_length: int
    cost: float
    num_right: int = field(init=False)
    num_unsure: int = 0
    sampler: Sampler = field(init=False)
    keys: mx.array = field(init=False)
    opened: DraftReader | None = None

    def __post_init__(self) -> None:
        self.num_right = self.prompt_length
        params = SamplingParams.from_config(self.config)
        self.sampler = Sampler((replace(params, repetition_penalty=1.0),))
        # not the keys of the answer: acceptance must not depend on what was drawn
        self.keys = mx.random.split(mx.random.key(choose_seed(self.config)), 3)[2:]

    @property
    def reader(self) -> DraftReader:
        """The model after the prompt."""
        if self.opened is None:
            self.opened = self.open_reader()
        return self.opened

    def can_propose(self, ids: Sequence[int]) -> bool:
        return True

    def propose(self, ids: Sequence[int], count: int) -> Draft | None:
        """Read what has become known, then draft token after token."""
        new = self.reader.readable(ids[self.num_right :])
        if not new:
            return None
        logits = self.reader.read(mx.array(new, dtype=mx.int32))
        self.num_right, self.num_unsure = len(ids), count - 1
        tokens, scores = list[mx.array](), list[mx.array]()
        while True:
            if self.sampler.is_random:
                scores.append(self.sampler.scores(logits))
                self.keys, own = split_keys(self.keys)
                tokens.append(draw_tokens(scores[-1], own))
            else:
                tokens.append(mx.argmax(logits, axis=-1).astype(mx.int32))
            if len(tokens) == count:
                return Draft(mx.concatenate(tokens), mx.concatenate(scores) if scores else None)
            logits = self.reader.read(tokens[-1])

    def accept(self, count: int) -> None:
        """Drop the drafted tokens that were rejected."""
        right = min(count, self.num_unsure)
        self.reader.rewind(self.num_unsure - right)
        self.num_right += right
        self.num_unsure = 0

    def close(self, ids: Sequence[int]) -> None:
        """Leave only accepted tokens in the prompt cache."""
        if self.opened is not None:
            self.opened.close(ids[self.prompt_length : self.num_right])


@dataclass(eq=False)
class FamilyReader:
    """A smaller InternVL with the same tokens, which reads the images too."""

    prefill: Prefill

    @classmethod
    def open(
        cls, model: InternVL, inputs: ModelInputs, config: GenerationConfig, cache: PromptCache
    ) -> "FamilyReader":
        """Read the prompt."""
        # Decoding stops speculating before dynamic NTK begins, so the draft model needs none.
        # It reads what the large model reads, and decides nothing about tiles.
        config = replace(config, ntk=False, visual_compression=False)
        prefill = open_prefill(model, inputs, config, cache)
        prefill.run(prefill.encode_images())
        return cls(prefill)

    def readable(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    def read(self, tokens: mx.array) -> mx.array:
        return self.prefill.engine.step(tokens)

    def rewind(self, count: int) -> None:
        self.prefill.engine.rewind(count)

    def close(self, generated_ids: Sequence[int]) -> None:
        self.prefill.commit(
            list(generated_ids), len(self.prefill.inputs.token_ids) + len(generated_ids)
        )
