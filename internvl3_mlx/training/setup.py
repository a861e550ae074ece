"""Resolve the model and validate the data of a run before loading any weights."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from internvl3_mlx.config import read_config
from internvl3_mlx.config.foreign import visible_files
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.processor import Processor
from internvl3_mlx.loading.fetch_model import DENSE_BITS, LocalModel, Notify, fetch_model
from internvl3_mlx.prompt.template import load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.records.streamed_parquet import StreamedTable
from internvl3_mlx.training.config import DISTILL_METHOD, TrainConfig, check_fixed_images
from internvl3_mlx.training.data.collate import BatchedDataset, batch_dataset
from internvl3_mlx.training.data.dataset import (
    open_dataset,
    split_off_share,
)
from internvl3_mlx.training.data.preprocess import Preprocessor
from internvl3_mlx.training.data.record_files import DataFile, Dataset
from internvl3_mlx.training.data.validate import DataReport, ValidationProgress, validate_dataset
from internvl3_mlx.training.rewards import REWARDS, reward_file
from internvl3_mlx.vlm import ignore_message

DIGEST_BYTES = 16
CHUNK_BYTES = 1 << 20

FLASH_NOTE = (
    "a Flash model is trained on the full form of every tile; its router and mlp2 stay as they are"
)


@dataclass(frozen=True)
class TaskProgress:
    """How far a long task before training is: ``done`` of ``total`` records."""

    task: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class DataSplit:
    """The records of one split, and what validation found in them."""

    dataset: Dataset
    report: DataReport

    @property
    def files(self) -> tuple[DataFile, ...]:
        return self.dataset.files


@dataclass(frozen=True, eq=False)
class RunSetup:
    """A configuration with its model folder and its validated data."""

    config: TrainConfig
    local_model: LocalModel
    preprocessor: Preprocessor
    train: DataSplit
    valid: DataSplit | None
    test: DataSplit | None = None
    teacher: LocalModel | None = None

    @property
    def splits(self) -> dict[str, DataSplit]:
        """The splits that there are, by name."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in named.items() if split}

    @property
    def model_folder(self) -> Path:
        return self.local_model.folder

    @property
    def model_name(self) -> str:
        """The model as the user named it, or its folder's name."""
        return self.config.model or self.model_folder.name

    @property
    def images_vary(self) -> bool:
        """Whether images are augmented, so that they differ each time they are read."""
        if self.config.augment is not None:
            return self.config.augment
        return any(file.augment for file in self.train.files)

    @cached_property
    def train_dataset(self) -> BatchedDataset:
        """The training data in batches; raises ``DataError`` with all errors of the data."""
        return batch_dataset(self.train.dataset, self.preprocessor, self.train.report)

    @cached_property
    def valid_dataset(self) -> BatchedDataset | None:
        """The validation data in batches, if there is any; raises ``DataError``."""
        if self.valid is None:
            return None
        return batch_dataset(self.valid.dataset, self.preprocessor, self.valid.report)

    @cached_property
    def test_dataset(self) -> BatchedDataset | None:
        """The test data in batches, if it is to be evaluated; raises ``DataError``."""
        if self.test is None:
            return None
        return batch_dataset(self.test.dataset, self.preprocessor, self.test.report)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the model and data, independent of their paths."""
        files = self.train.files
        uses = [(len(f.selected), f.repeats, f.augment, f.max_tiles) for f in files]
        weights = visible_files(self.model_folder, "*.safetensors*")
        found = {
            "model": files_digest(weights, full=False),
            "data": files_digest([path for f in files for path in f.source.paths], full=True),
            "use of the data": repr(uses),  # the selections and limits of a meta JSON
        }
        streams = [f.source.version for f in files if isinstance(f.source, StreamedTable)]
        if streams:
            found["revision of the data"] = repr(streams)
        own_reward = reward_file(self.config.reward or "")
        if own_reward is not None and own_reward.is_file():
            found["file of the reward"] = files_digest([own_reward], full=True)
        return found


def prepare_run(
    config: TrainConfig, notify: Notify = ignore_message, *, decode: bool = False
) -> Generator[TaskProgress, None, RunSetup]:
    """Resolve the model and validate all data. Errors in the data are in the reports.

    decode: decode all images and videos, rather than read their headers. Yields progress and
    returns the setup. Raises ``UserError`` for a configuration that the data cannot serve.
    """
    if config.data is None:
        raise UserError("no training data; set data to a folder or a JSONL file")
    if config.samples_answers and config.reward is None:
        raise UserError(
            f"method grpo needs a reward; name one with --reward: {', '.join(REWARDS)} or "
            "FILE.py:FUNCTION"
        )
    if config.method == DISTILL_METHOD and config.teacher is None:
        raise UserError("method distill needs a teacher; name a model with --teacher")
    train = open_dataset(config.data, "train", config=config, notify=notify)
    if train is None:
        raise UserError(f"no training data in {config.data}; pass a folder with train.jsonl")
    if config.stream_records is not None and not train.is_streamed:
        raise UserError(
            f"stream_records reads data sets on the Hub, and {config.data} is on this disk; drop it"
        )
    valid = open_valid_split(config)
    if config.valid_share is not None:
        if valid is not None:
            raise UserError(
                f"{config.data} has validation data, and valid_share would split off more; drop "
                "valid_share, or name the training file alone"
            )
        train, valid = split_off_share(train, config)
    test = open_test_split(config)
    check_validation_data(config, valid)
    local_model = fetch_model(config.model, config.q_bits or DENSE_BITS, notify=notify)
    teacher = None
    if config.teacher is not None:
        teacher = fetch_model(config.teacher, None, notify=notify)
    preprocessor = Preprocessor(load_processor(local_model.folder), config)
    if preprocessor.processor.config.flash_mode:
        notify(FLASH_NOTE)
    splits: dict[str, DataSplit] = {}
    for name, dataset in (("training", train), ("validation", valid), ("test", test)):
        if dataset is not None:
            progress = validate_dataset(dataset, preprocessor, decode=decode)
            splits[name] = yield from validate_split(dataset, progress, f"checking {name} data")
    setup = RunSetup(
        config,
        local_model,
        preprocessor,
        splits["training"],
        splits.get("validation"),
        splits.get("test"),
        teacher,
    )
    if setup.images_vary:
        check_fixed_images(config)
    return setup


def open_valid_split(config: TrainConfig) -> Dataset | None:
    """Open the validation data: what the configuration names, or else the folder's own split."""
    if config.valid_data is not None:
        return open_dataset(config.valid_data, "train", config=config)
    assert config.data is not None
    return open_dataset(config.data, "valid", config=config)


def open_test_split(config: TrainConfig) -> Dataset | None:
    """Open the test data, if it is to be evaluated. Raises ``UserError`` if there is none."""
    if config.test_data is not None:
        return open_dataset(config.test_data, "train", config=config)
    if not config.test:
        return None
    assert config.data is not None
    found = open_dataset(config.data, "test", config=config)
    if found is None:
        raise UserError(f"no test data in {config.data}; add test.jsonl or set test_data")
    return found


def check_validation_data(config: TrainConfig, valid: Dataset | None) -> None:
    """Raise ``UserError`` if a setting needs validation data and there is none."""
    needs_valid = config.patience or config.eval_accuracy or config.eval_metric
    if valid is None and needs_valid:
        raise UserError(
            f"patience, eval_accuracy and eval_metric need validation data, and {config.data} has "
            "none; add valid.jsonl, or set valid_data or valid_share"
        )


def load_processor(folder: Path) -> Processor:
    """Load the configuration, tokenizer and template of a model, without its weights."""
    config = read_config(folder)
    return Processor(config, Tokenizer.from_folder(folder), load_template(config, folder))


def validate_split(
    dataset: Dataset, steps: Iterator[ValidationProgress], task: str
) -> Generator[TaskProgress, None, DataSplit]:
    """Validate all records of a split, yielding progress."""
    report: DataReport | None = None
    for progress in steps:
        yield TaskProgress(task, progress.done, progress.total)
        report = progress.report
    assert report is not None
    return DataSplit(dataset, report)


def files_digest(paths: list[Path], *, full: bool) -> str:
    """Return a digest of the names, sizes and contents of files.

    full: read all of each file, rather than its first MiB. The first MiB of weights includes the
    header; reading all of them would take as long as loading them.
    """
    summary = blake2b(digest_size=DIGEST_BYTES)
    for path in paths:
        summary.update(f"{path.name} {path.stat().st_size}".encode())
        for chunk in read_chunks(path, full=full):
            summary.update(chunk)
    return summary.hexdigest()


def read_chunks(path: Path, *, full: bool) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            if not full:
                return
