"""What a run stands on before its model loads: where things are, and rows that were checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.processor import Processor
from internvl3_mlx.loading.fetch_model import DENSE_BITS, LocalModel, Notify, fetch_model
from internvl3_mlx.prompt.template import load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.config import DataSettings, TrainConfig, check_fixed_images
from internvl3_mlx.training.data.collate import BatchedDataset, batch_dataset
from internvl3_mlx.training.data.dataset import Dataset, open_dataset
from internvl3_mlx.training.data.preprocess import Preprocessor
from internvl3_mlx.training.data.validate import DataReport, validate_dataset

ProgressCallback = Callable[[str, int, int], None]  # what is being done, how far, of how much
DIGEST_BYTES = 16
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class DataSplit:
    """The rows of one split, and what checking them found."""

    dataset: Dataset
    report: DataReport


@dataclass(frozen=True, eq=False)
class RunSetup:
    """A recipe with its model's folder and its data."""

    config: TrainConfig
    local_model: LocalModel
    preprocessor: Preprocessor
    train: DataSplit
    valid: DataSplit | None

    @property
    def model_config(self) -> ModelConfig:
        return self.preprocessor.processor.config

    @property
    def images_vary(self) -> bool:
        """Whether pictures are other each time they are read."""
        asked = self.config.augment
        told = (source.augment for source in self.train.dataset.files)
        return any(told) if asked is None else asked

    @cached_property
    def train_dataset(self) -> BatchedDataset:
        """The training rows, to be read in batches; raises DataError with all their faults."""
        return batch_dataset(self.train.dataset, self.preprocessor, self.train.report)

    @cached_property
    def valid_dataset(self) -> BatchedDataset | None:
        if self.valid is None:
            return None
        return batch_dataset(self.valid.dataset, self.preprocessor, self.valid.report)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name model and data by their content, whatever they are called."""
        sources = self.train.dataset.files
        uses = [(len(s.selected), s.repeats, s.augment, s.max_tiles) for s in sources]
        return {
            "model": files_digest(
                sorted(self.local_model.folder.glob("*.safetensors*")), full=False
            ),
            "data": files_digest([source.lines.path for source in sources], full=True),
            "use of the data": repr(uses),  # a meta JSON's counts and limits
        }


def prepare_run(config: TrainConfig, notify: Notify, advance: ProgressCallback) -> RunSetup:
    """Find model and data of a recipe, and check every row. Faults are in the surveys."""
    settings = to_data_settings(config)
    assert config.data is not None
    train = open_dataset(config.data, "train", config=settings)
    valid = open_valid_split(config, settings)
    if train is None:
        raise UserError(f"no training rows in {config.data}; name a folder with train.jsonl")
    ready = fetch_model(config.model, config.q_bits or DENSE_BITS, notify=notify)
    maker = Preprocessor(load_processor(ready.folder), settings)
    ground = RunSetup(
        config,
        ready,
        maker,
        DataSplit(train, validate_with_progress(train, maker, "checking rows", advance)),
        DataSplit(valid, validate_with_progress(valid, maker, "checking validation rows", advance))
        if valid
        else None,
    )
    if ground.images_vary:
        check_fixed_images(config)
    if valid is None and (config.patience or config.eval_accuracy):
        raise UserError(
            f"patience and eval_accuracy need validation rows, and {config.data} has none; "
            "add valid.jsonl or name --valid-data"
        )
    return ground


def to_data_settings(config: TrainConfig) -> DataSettings:
    """Take what concerns the data: the fields of both have the same names."""
    return DataSettings(
        **{entry.name: getattr(config, entry.name) for entry in fields(DataSettings)}
    )


def open_valid_split(config: TrainConfig, settings: DataSettings) -> Dataset | None:
    """Find the validation rows: those that are named, else the folder's own."""
    if config.valid_data is not None:
        return open_dataset(config.valid_data, "train", config=settings)
    assert config.data is not None
    return open_dataset(config.data, "valid", config=settings)


def load_processor(folder: Path) -> Processor:
    """Read all of a model but its weights."""
    config = read_config(folder)
    return Processor(config, Tokenizer.from_folder(folder), load_template(config, folder))


def validate_with_progress(
    dataset: Dataset, preprocessor: Preprocessor, text: str, advance: ProgressCallback
) -> DataReport:
    found: DataReport | None = None
    for look in validate_dataset(dataset, preprocessor):
        advance(text, look.done, look.total)
        found = look.report
    assert found is not None
    return found


def files_digest(paths: list[Path], *, full: bool) -> str:
    """Name files by their bytes; of weights only the headers and sizes are read, or it would take
    as long as loading them."""
    summary = blake2b(digest_size=DIGEST_BYTES)
    for path in paths:
        summary.update(f"{path.name} {path.stat().st_size}".encode())
        for part in read_chunks(path, full=full):
            summary.update(part)
    return summary.hexdigest()


def read_chunks(path: Path, *, full: bool) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(CHUNK_BYTES):
            yield part
            if not full:
                return
