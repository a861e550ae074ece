"""Reference log-probabilities for preference optimization.

The reference is the model itself with its adapters disabled, never a second copy. The disk cache
computes each answer once: in a folder named by the weights of the base model, under a key made of
everything that the answer's log-probabilities depend on.
"""

import contextlib
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.reader import TensorInfo, read_header
from internvl3_mlx.device import on_gpu
from internvl3_mlx.errors import CheckpointError, TrainingError, WriteError
from internvl3_mlx.files import atomic_write, content_digest
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.models.chunked_attention import NUMERICS
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.lora_setup import adapters_disabled
from internvl3_mlx.training.objectives import target_log_probs

KEY_BYTES = 16
ANSWERS_PER_FILE = 512  # the most that a killed run loses
ANSWER_FILES = "*.safetensors"


def reference_log_probs(
    model: InternVL, batch: Batch, vision_features: mx.array | None
) -> mx.array:
    """Score every target with the adapters disabled and without dropout: -> (N,), evaluated.

    vision_features: as for ``target_states``. This is the reference only as long as nothing but
    adapters has been trained.
    """
    with adapters_disabled(model):
        scores = mx.stop_gradient(target_log_probs(model, batch, vision_features))
        mx.eval(scores)
    return scores


class ReferenceLogProbs:
    """Reference log-probabilities, computed once and cached in ``folder``.

    Create it while the model is still the base model: before it is adapted or trained.
    """

    def __init__(self, model: InternVL, folder: Path) -> None:
        self.model, self.frozen = model, False
        self.folder = Path(folder) / base_fingerprint(model)
        self.unsaved: dict[str, np.ndarray] = {}
        self.saved = dict(index_saved_answers(self.folder))

    def get(self, batch: Batch, vision_features: mx.array | None) -> mx.array:
        """Return the reference of every target, computing what is missing: (N,) float32.

        Raises ``TrainingError`` if something is missing after ``freeze``.
        """
        keys = answer_keys(batch, self.model.image_id)
        if not all(key in self.unsaved or key in self.saved for key in keys):
            self.compute(keys, batch, vision_features)
        scores = np.zeros(len(batch.targets), np.float32)
        for number, key in enumerate(keys):
            scores[np.asarray(batch.answer_ids) == number] = self.look_up(key)
        return mx.array(scores)

    def compute(self, keys: list[str], batch: Batch, vision_features: mx.array | None) -> None:
        if self.frozen:
            raise TrainingError(
                f"{', '.join(batch.locations)}: no reference was computed before training; "
                "train adapters only, or start a new run"
            )
        scores = np.array(reference_log_probs(self.model, batch, vision_features))
        answer_ids = np.asarray(batch.answer_ids)
        self.unsaved |= {key: scores[answer_ids == number] for number, key in enumerate(keys)}
        if len(self.unsaved) >= ANSWERS_PER_FILE:
            self.flush()

    def look_up(self, key: str) -> np.ndarray:
        if key in self.unsaved:
            return self.unsaved[key]
        info = self.saved[key]
        assert info.start is not None
        return np.fromfile(info.file, "<f4", count=info.shape[0], offset=info.start)

    def flush(self) -> None:
        """Write what is not saved yet to a new file."""
        if not self.unsaved:
            return
        try:
            self.saved |= save_answers(self.folder, self.unsaved)
        except (WriteError, OSError, RuntimeError) as error:
            raise TrainingError(
                f"cannot cache the reference in {self.folder}: {error}; free some disk space, or "
                "drop --cache-reference"
            ) from error
        self.unsaved.clear()

    def freeze(self) -> None:
        """Save everything and refuse to compute more: training is about to change the weights."""
        self.flush()
        self.frozen = True


def base_fingerprint(model: InternVL) -> str:
    """Identify what affects the last digits: weights, compute dtype, device and attention."""
    dtype = str(model.language_model.model.norm.weight.dtype).rpartition(".")[2]
    device = "gpu" if on_gpu() else "cpu"
    return f"{model_fingerprint(model)}-{dtype}-{device}-{NUMERICS}"


def index_saved_answers(folder: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the answers in a folder; a damaged file counts as missing."""
    for path in sorted(folder.glob(ANSWER_FILES)):
        if path.name.startswith("."):
            continue
        with contextlib.suppress(CheckpointError, OSError):
            yield from ((info.name, info) for info in read_header(path))


def save_answers(folder: Path, answers: Mapping[str, np.ndarray]) -> dict[str, TensorInfo]:
    """Write arrays by their keys to a new file in a folder; return where each is.

    Raises WriteError, OSError or RuntimeError.
    """
    path = folder / f"{content_digest(*sorted(answers))}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        arrays = {key: mx.array(values) for key, values in answers.items()}
        mx.save_safetensors(str(temporary), arrays)
    return {info.name: info for info in read_header(path)}


def answer_keys(batch: Batch, image_id: int) -> list[str]:
    """Return a key for each answer: a hash of its prompt, positions, images and tokens."""
    input_ids, answer_ids = np.asarray(batch.input_ids), np.asarray(batch.answer_ids)
    keys = []
    for number in range(batch.num_answers):
        own = np.flatnonzero(answer_ids == number)
        first = int(np.asarray(batch.target_positions)[own[0]])  # the prompt's last token
        span = next(span for span in batch.spans if span.start <= first < span.stop)
        prompt = slice(span.start, first + 1)
        digest = blake2b(digest_size=KEY_BYTES)
        for part in (input_ids[prompt], np.asarray(batch.positions)[prompt]):
            digest.update(np.ascontiguousarray(part).tobytes())
        for image_hash in image_keys(batch, input_ids, image_id, prompt):
            digest.update(image_hash)
        digest.update(np.asarray(batch.targets)[own].astype(np.int32).tobytes())
        keys.append(digest.hexdigest())
    return keys


def image_keys(batch: Batch, input_ids: np.ndarray, image_id: int, prompt: slice) -> list[bytes]:
    """Return the hashes of the images whose tokens are in a slice of the batch."""
    counts = np.cumsum(input_ids == image_id)
    before = int(counts[prompt.start - 1]) if prompt.start else 0
    after = int(counts[prompt.stop - 1])
    ends = np.cumsum([image.info.tokens for image in batch.images])
    return [
        image.content_hash
        for image, end in zip(batch.images, ends, strict=True)
        if before < end <= after
    ]
