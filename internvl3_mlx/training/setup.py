"""What a run stands on before its model loads: where things are, and rows that were checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.processor import Preparer
from internvl3_mlx.loading.fetch_model import DENSE_BITS, Notify, Ready, prepare
from internvl3_mlx.prompt.template import template_for
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.config import DataSettings, TrainRecipe, check_asked_beforehand
from internvl3_mlx.training.data.collate import Corpus, corpus
from internvl3_mlx.training.data.dataset import Data, open_data
from internvl3_mlx.training.data.preprocess import Maker
from internvl3_mlx.training.data.validate import Survey, survey

Advance = Callable[[str, int, int], None]  # what is being done, how far, of how much
DIGEST_BYTES = 16
READ_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one split, and what checking them found."""

    data: Data
    survey: Survey


@dataclass(frozen=True, eq=False)
class Ground:
    """A recipe with its model's folder and its data."""

    recipe: TrainRecipe
    ready: Ready
    maker: Maker
    train: Rows
    valid: Rows | None

    @property
    def config(self) -> ModelConfig:
        return self.maker.preparer.config

    @property
    def draws_pictures(self) -> bool:
        """Whether pictures are other each time they are read."""
        asked = self.recipe.augment
        told = (source.augment for source in self.train.data.sources)
        return any(told) if asked is None else asked

    @cached_property
    def train_corpus(self) -> Corpus:
        """The training rows, to be read in batches; raises DataError with all their faults."""
        return corpus(self.train.data, self.maker, self.train.survey)

    @cached_property
    def valid_corpus(self) -> Corpus | None:
        if self.valid is None:
            return None
        return corpus(self.valid.data, self.maker, self.valid.survey)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name model and data by their content, whatever they are called."""
        sources = self.train.data.sources
        uses = [(len(s.taken), s.passes, s.augment, s.max_tiles) for s in sources]
        return {
            "model": digest(sorted(self.ready.folder.glob("*.safetensors*")), whole=False),
            "data": digest([source.lines.path for source in sources], whole=True),
            "use of the data": repr(uses),  # a meta JSON's counts and limits
        }


def look_around(recipe: TrainRecipe, notify: Notify, advance: Advance) -> Ground:
    """Find model and data of a recipe, and check every row. Faults are in the surveys."""
    settings = data_settings(recipe)
    assert recipe.data is not None
    train = open_data(recipe.data, "train", settings=settings)
    valid = open_valid(recipe, settings)
    if train is None:
        raise UserError(f"no training rows in {recipe.data}; name a folder with train.jsonl")
    ready = prepare(recipe.model, recipe.q_bits or DENSE_BITS, notify=notify)
    maker = Maker(preparer_of(ready.folder), settings)
    ground = Ground(
        recipe,
        ready,
        maker,
        Rows(train, surveyed(train, maker, "checking rows", advance)),
        Rows(valid, surveyed(valid, maker, "checking validation rows", advance)) if valid else None,
    )
    if ground.draws_pictures:
        check_asked_beforehand(recipe)
    if valid is None and (recipe.patience or recipe.eval_accuracy):
        raise UserError(
            f"patience and eval_accuracy need validation rows, and {recipe.data} has none; "
            "add valid.jsonl or name --valid-data"
        )
    return ground


def data_settings(recipe: TrainRecipe) -> DataSettings:
    """Take what concerns the data: the fields of both have the same names."""
    return DataSettings(
        **{entry.name: getattr(recipe, entry.name) for entry in fields(DataSettings)}
    )


def open_valid(recipe: TrainRecipe, settings: DataSettings) -> Data | None:
    """Find the validation rows: those that are named, else the folder's own."""
    if recipe.valid_data is not None:
        return open_data(recipe.valid_data, "train", settings=settings)
    assert recipe.data is not None
    return open_data(recipe.data, "valid", settings=settings)


def preparer_of(folder: Path) -> Preparer:
    """Read all of a model but its weights."""
    config = read_config(folder)
    return Preparer(config, Tokenizer.from_folder(folder), template_for(config, folder))


def surveyed(data: Data, maker: Maker, text: str, advance: Advance) -> Survey:
    found: Survey | None = None
    for look in survey(data, maker):
        advance(text, look.done, look.total)
        found = look.survey
    assert found is not None
    return found


def digest(paths: list[Path], *, whole: bool) -> str:
    """Name files by their bytes; of weights only the headers and sizes are read, or it would take
    as long as loading them."""
    summary = blake2b(digest_size=DIGEST_BYTES)
    for path in paths:
        summary.update(f"{path.name} {path.stat().st_size}".encode())
        for part in parts_of(path, whole=whole):
            summary.update(part)
    return summary.hexdigest()


def parts_of(path: Path, *, whole: bool) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            yield part
            if not whole:
                return
