"""What the base thinks of both answers: the reference that preferences are measured from.

It is the model itself with its adapters switched off, never a second one. Kept on disk it is
computed once: in a folder named by the base's weights, each answer under the name of all that its
log-probabilities depend on.
"""

import contextlib
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.reader import TensorInfo, read_header
from internvl3_mlx.errors import CheckpointError, TrainingError
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.lora_setup import adapters_disabled
from internvl3_mlx.training.objectives import target_log_probs
from internvl3_mlx.training.token_log_probs import CHUNK

KEY_BYTES = 16
ANSWERS_PER_FILE = 512  # in one file: what a killed run loses at most
ANSWER_FILES = "*.safetensors"


def reference_log_probs(model: InternVL, batch: Batch, vision: mx.array | None) -> mx.array:
    """Score every target with the adapters switched off, without dropout: -> (N,), evaluated.

    vision: what ``supervised_states`` takes. True to the base only while nothing but adapters was
    trained.
    """
    with adapters_disabled(model):
        found = mx.stop_gradient(target_log_probs(model, batch, vision, chunk=CHUNK))
        mx.eval(found)
    return found


class ReferenceLogProbs:
    """Reference log-probabilities, computed once and kept in ``folder``.

    Make it while the model is still its base: before it is adapted, or trained in full.
    """

    def __init__(self, model: InternVL, folder: Path) -> None:
        self.model, self.frozen = model, False
        self.folder = Path(folder) / base_fingerprint(model)
        self.unsaved: dict[str, np.ndarray] = {}
        self.saved = dict(index_saved_answers(self.folder))

    def get(self, batch: Batch, vision: mx.array | None) -> mx.array:
        """Give the reference of every target: (N,) float32. What is not known yet is computed.

        Raises TrainingError when it is not known and the base is gone (``seal``).
        """
        names = answer_keys(batch, self.model.image_id)
        if not all(name in self.unsaved or name in self.saved for name in names):
            self.compute(names, batch, vision)
        found = np.zeros(len(batch.targets), np.float32)
        for number, name in enumerate(names):
            found[np.asarray(batch.answer_ids) == number] = self.look_up(name)
        return mx.array(found)

    def compute(self, keys: list[str], batch: Batch, vision: mx.array | None) -> None:
        if self.frozen:
            raise TrainingError(
                f"{', '.join(batch.locations)}: no reference was computed before the weights moved; "
                "train adapters alone, or begin a new run"
            )
        values = np.array(reference_log_probs(self.model, batch, vision))
        owner = np.asarray(batch.answer_ids)
        self.unsaved |= {name: values[owner == number] for number, name in enumerate(keys)}
        if len(self.unsaved) >= ANSWERS_PER_FILE:
            self.flush()

    def look_up(self, key: str) -> np.ndarray:
        if key in self.unsaved:
            return self.unsaved[key]
        info = self.saved[key]
        assert info.start is not None
        return np.fromfile(info.file, "<f4", count=info.shape[0], offset=info.start)

    def flush(self) -> None:
        """Write what is new: aside, and renamed when it is whole."""
        if not self.unsaved:
            return
        name = blake2b("".join(sorted(self.unsaved)).encode(), digest_size=KEY_BYTES).hexdigest()
        path, aside = self.folder / f"{name}.safetensors", self.folder / f".{name}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(f"{aside}.safetensors", to_mx_arrays(self.unsaved))
            os.replace(f"{aside}.safetensors", path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"cannot keep the reference in {self.folder}: {error}; free some space, or leave "
                "out --cache-reference"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(f"{aside}.safetensors")
        self.saved |= {info.name: info for info in read_header(path)}
        self.unsaved.clear()

    def freeze(self) -> None:
        """Compute nothing from here on: the weights move, and the base is gone."""
        self.flush()
        self.frozen = True


def base_fingerprint(model: InternVL) -> str:
    """Name a model by its weights and by what it computes in: both show in the last digits."""
    dtype = str(model.language_model.model.norm.weight.dtype).rpartition(".")[2]
    return f"{model_fingerprint(model)}-{dtype}"


def index_saved_answers(folder: Path) -> Iterator[tuple[str, TensorInfo]]:
    """List what is kept in a folder; a file that is damaged counts as absent."""
    for path in sorted(folder.glob(ANSWER_FILES)):
        if path.name.startswith("."):
            continue
        with contextlib.suppress(CheckpointError, OSError):
            yield from ((info.name, info) for info in read_header(path))


def to_mx_arrays(answers: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(values) for name, values in answers.items()}


def answer_keys(batch: Batch, image_id: int) -> list[str]:
    """Name each answer by its content: prompt, positions, pictures, and the answer's tokens."""
    ids, owner = np.asarray(batch.input_ids), np.asarray(batch.answer_ids)
    names = []
    for number in range(batch.num_answers):
        mine = np.flatnonzero(owner == number)
        first = int(np.asarray(batch.target_positions)[mine[0]])  # the prompt's last token
        span = next(span for span in batch.spans if span.start <= first < span.stop)
        prompt = slice(span.start, first + 1)
        named = blake2b(digest_size=KEY_BYTES)
        for part in (ids[prompt], np.asarray(batch.positions)[prompt]):
            named.update(np.ascontiguousarray(part).tobytes())
        for key in image_keys(batch, ids, image_id, prompt):
            named.update(key)
        named.update(np.asarray(batch.targets)[mine].astype(np.int32).tobytes())
        names.append(named.hexdigest())
    return names


def image_keys(batch: Batch, ids: np.ndarray, image_id: int, prompt: slice) -> list[bytes]:
    """Find the pictures whose tokens lie in a stretch of the row."""
    counted = np.cumsum(ids == image_id)
    before = int(counted[prompt.start - 1]) if prompt.start else 0
    until = int(counted[prompt.stop - 1])
    ends = np.cumsum([seen.info.tokens for seen in batch.images])
    return [
        seen.content_hash
        for seen, end in zip(batch.images, ends, strict=True)
        if before < end <= until
    ]
