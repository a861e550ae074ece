"""Soft targets for distillation: a teacher's most likely tokens at every target, kept on disk.

The teacher reads all records once, before the student is loaded. The next run of the same teacher
and data finds them, and so does a run that was killed meanwhile.
"""

from collections.abc import Generator, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.reader import TensorInfo
from internvl3_mlx.errors import TrainingError, UserError, WriteError
from internvl3_mlx.files import cache_folder
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.distillation import SoftTargets
from internvl3_mlx.training.forward import target_states
from internvl3_mlx.training.reference import (
    answer_keys,
    base_fingerprint,
    index_saved_answers,
    save_answers,
)
from internvl3_mlx.training.run_memory import preparing
from internvl3_mlx.training.setup import RunSetup, TaskProgress
from internvl3_mlx.training.token_log_probs import states_per_chunk

SOFT_TARGETS_FOLDER = "soft-targets"  # in the cache folder
ANSWERS_PER_FILE = 512  # the most that a killed run computes again
DISK_BYTES = 20 * 2**30
IDS, LOG_PROBS = "ids", "log_probs"
SAMPLE_TEXT = "The bill is 12.40 \N{EURO SIGN}, 東京 по-русски <box>[[1, 2]]</box>\n\t x²"


class SoftTargetStore:
    """Soft targets on disk, in a folder named by the teacher, ``top_k`` and the temperature.

    An answer's key is made of everything that its soft targets depend on. What a killed run
    computed is found by the next one.
    """

    def __init__(
        self, folder: Path, image_id: int, top_k: int, limit_bytes: int = DISK_BYTES
    ) -> None:
        self.folder, self.image_id, self.top_k = folder, image_id, top_k
        self.limit_bytes = limit_bytes
        self.unsaved: dict[str, np.ndarray] = {}
        self.saved: dict[str, TensorInfo] = dict(index_saved_answers(folder))
        self.nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def has(self, batch: Batch) -> bool:
        """Whether the soft targets of all answers of a batch are known."""
        names = [f"{key}.{IDS}" for key in answer_keys(batch, self.image_id)]
        return all(name in self.unsaved or name in self.saved for name in names)

    def add(self, batch: Batch, found: SoftTargets) -> None:
        """Keep the soft targets of a batch. Raises TrainingError at the limit of the disk."""
        ids, log_probs = np.array(found.ids, np.int32), np.array(found.log_probs, np.float32)
        answer_ids = np.asarray(batch.answer_ids)
        for number, key in enumerate(answer_keys(batch, self.image_id)):
            own = answer_ids == number
            self.unsaved[f"{key}.{IDS}"] = ids[own]
            self.unsaved[f"{key}.{LOG_PROBS}"] = log_probs[own]
            self.nbytes += ids[own].nbytes + log_probs[own].nbytes
        if self.nbytes > self.limit_bytes:
            raise TrainingError(
                f"the soft targets in {self.folder} take more than "
                f"{self.limit_bytes / 1e9:.1f} GB; lower --distill-top-k or use less data"
            )
        if len(self.unsaved) >= 2 * ANSWERS_PER_FILE:
            self.flush()

    def get(self, batch: Batch) -> SoftTargets:
        """Return the soft targets of a batch; raises TrainingError if one was not computed."""
        count = len(batch.targets)
        ids = np.zeros((count, self.top_k), np.int32)
        log_probs = np.zeros((count, self.top_k), np.float32)
        answer_ids = np.asarray(batch.answer_ids)
        for number, key in enumerate(answer_keys(batch, self.image_id)):
            own = answer_ids == number
            ids[own] = self.look_up(f"{key}.{IDS}", "<i4", batch)
            log_probs[own] = self.look_up(f"{key}.{LOG_PROBS}", "<f4", batch)
        return SoftTargets(mx.array(ids), mx.array(log_probs))

    def look_up(self, name: str, dtype: str, batch: Batch) -> np.ndarray:
        if name in self.unsaved:
            return self.unsaved[name]
        info = self.saved.get(name)
        if info is None or info.start is None:
            raise TrainingError(
                f"{', '.join(batch.locations)}: the teacher has not seen this answer; start a new "
                "run"
            )
        flat = np.fromfile(info.file, dtype, info.shape[0] * info.shape[1], offset=info.start)
        return flat.reshape(info.shape)

    def flush(self) -> None:
        """Write what is not saved yet to a new file."""
        if not self.unsaved:
            return
        try:
            self.saved |= save_answers(self.folder, self.unsaved)
        except (WriteError, OSError, RuntimeError) as error:
            raise TrainingError(
                f"cannot keep the soft targets in {self.folder}: {error}; free some disk space"
            ) from error
        self.unsaved.clear()


def store_name(teacher: InternVL, top_k: int, temperature: float) -> str:
    """Name the folder of a teacher's soft targets: what they depend on besides the data."""
    return f"{base_fingerprint(teacher)}-top{top_k}-t{temperature:g}"


def teacher_targets(
    teacher: InternVL, batch: Batch, features: mx.array | None, top_k: int, temperature: float
) -> SoftTargets:
    """Compute the teacher's soft targets at every target of a batch, a few states at a time."""
    states = target_states(teacher, batch, features)
    ids, log_probs = list[mx.array](), list[mx.array]()
    step = states_per_chunk()
    for start in range(0, states.shape[0], step):
        logits = teacher.language_model.head(states[start : start + step]).astype(mx.float32)
        scores = logits / temperature
        scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        best = mx.argpartition(-scores, top_k - 1, axis=-1)[:, :top_k]
        ids.append(best.astype(mx.int32))
        log_probs.append(mx.take_along_axis(scores, best, axis=-1))
        mx.eval(ids[-1], log_probs[-1])
    return SoftTargets(mx.concatenate(ids), mx.concatenate(log_probs))


def compute_soft_targets(setup: RunSetup) -> Generator[TaskProgress, None, SoftTargetStore]:
    """Let the teacher read all records, and return the store of what it said.

    The teacher is in memory only while this runs. Raises UserError for a teacher that does not fit
    the student.
    """
    config = setup.config
    assert setup.teacher is not None
    loaded = load_local_model(
        setup.teacher.folder,
        quantize=setup.teacher.recipe,
        dtype=config.dtype,
        for_training=True,
    )
    check_teacher(loaded.model, loaded.tokenizer, setup)
    name = store_name(loaded.model, config.distill_top_k, config.distill_temperature)
    folder = cache_folder(SOFT_TARGETS_FOLDER) / name
    store = SoftTargetStore(folder, loaded.model.image_id, config.distill_top_k)
    with preparing():
        yield from ask_teacher(loaded.model, setup, store)
    del loaded
    mx.clear_cache()
    return store


def ask_teacher(
    teacher: InternVL, setup: RunSetup, store: SoftTargetStore
) -> Iterator[TaskProgress]:
    """Let the teacher read what the store does not hold yet."""
    config = setup.config
    for dataset in filter(None, (setup.train_dataset, setup.valid_dataset, setup.test_dataset)):
        done, total = 0, len(dataset.sizes)
        for batch in dataset.iter_once():
            if not store.has(batch):
                top_k, temperature = config.distill_top_k, config.distill_temperature
                store.add(batch, teacher_targets(teacher, batch, None, top_k, temperature))
            done += len(batch.locations)
            yield TaskProgress("asking the teacher", done, total)
    store.flush()


def check_teacher(teacher: InternVL, tokenizer: Tokenizer, setup: RunSetup) -> None:
    """Raise UserError unless a teacher reads the same tokens and tiles as the student."""
    processor = setup.preprocessor.processor
    own, theirs, mine = teacher.config, tokenizer, processor.tokenizer
    pairs = {
        "vocabulary": (own.text.vocab_size, processor.config.text.vocab_size),
        "tokenizer": (theirs.encode_text(SAMPLE_TEXT), mine.encode_text(SAMPLE_TEXT)),
        "special tokens": (
            {text: token.id for text, token in theirs.added.items()},
            {text: token.id for text, token in mine.added.items()},
        ),
        "tile size": (own.vision.image_size, processor.config.vision.image_size),
        "tokens per tile": (own.num_image_token, processor.config.num_image_token),
    }
    for name, (teachers, students) in pairs.items():
        if teachers != students:
            raise UserError(
                f"{setup.config.teacher} cannot teach {setup.model_name}: the {name} differs; "
                "choose a teacher of the same family"
            )
    if setup.config.distill_top_k > own.text.vocab_size:
        raise UserError(
            f"distill_top_k is {setup.config.distill_top_k}, but the vocabulary has only "
            f"{own.text.vocab_size} tokens"
        )
