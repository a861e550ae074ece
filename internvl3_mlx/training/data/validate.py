"""All rows looked at before the model loads: what is wrong is told by file and line, at once."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data.batch_sampler import Sizes
from internvl3_mlx.training.data.dataset import Data, Entry
from internvl3_mlx.training.data.preprocess import Maker, TooLong
from internvl3_mlx.training.data.schema import RowFault

MOST_TOLD = 100  # faults, and notes, that are kept; beyond that they are counted


@dataclass(frozen=True)
class Told:
    """Something about one row. ``place``: file and line."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found in the rows.

    faults: what must be mended. notes: rows that were cut or left out for their length.
    more_faults, more_notes: how many further ones there are. sizes: of the rows that can be used.
    """

    rows: int
    faults: tuple[Told, ...]
    more_faults: int
    notes: tuple[Told, ...]
    more_notes: int
    left_out: int
    shortened: int
    sizes: Sizes

    def raise_faults(self) -> None:
        """Raise ``DataError`` with all that must be mended."""
        if self.faults:
            more = [f"and {self.more_faults:,} more"] if self.more_faults else []
            raise DataError("\n".join([*map(str, self.faults), *more]))
        if not len(self.sizes.numbers):
            raise DataError(
                f"none of {self.rows:,} rows fits; raise --max-seq-length or lower --max-tiles"
            )


@dataclass(frozen=True, eq=False)
class Look:
    """How far a survey is; the last one carries it."""

    done: int
    total: int
    survey: Survey | None = None


class Tally:
    """Keeps the first of many, and counts the rest."""

    def __init__(self) -> None:
        self.kept: list[Told] = []
        self.more = 0

    def add(self, place: str, text: str) -> None:
        if len(self.kept) < MOST_TOLD:
            self.kept.append(Told(place, text))
        else:
            self.more += 1


class Surveyor:
    """Goes through rows and remembers what they take: sixteen bytes a row."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.faults, self.notes = Tally(), Tally()
        self.numbers, self.tokens, self.tiles = array("q"), array("i"), array("i")
        self.left_out = self.shortened = 0

    def see(self, entry: Entry) -> None:
        """Check one row."""
        limit = self.maker.settings.max_seq_length
        try:
            measure = self.maker.measure(entry)
        except TooLong as error:
            self.left_out += 1
            self.notes.add(entry.place, f"left out: {error}")
            return
        except RowFault as error:
            self.faults.add(entry.place, str(error))
            return
        except DataError as error:
            self.faults.add(entry.place, str(error).removeprefix(f"{entry.place}: "))
            return
        if measure.cut:
            self.shortened += 1
            self.notes.add(
                entry.place, f"cut to {limit:,} tokens, {measure.cut:,} of its answers are lost"
            )
        self.numbers.append(entry.number)
        self.tokens.append(measure.tokens)
        self.tiles.append(measure.tiles)

    def repeat(self, known: int, rows: int, passes: int) -> None:
        """Count what was found since ``known`` once more for each further pass through a file."""
        numbers, tokens, tiles = self.numbers[known:], self.tokens[known:], self.tiles[known:]
        for again in range(1, passes):
            self.numbers.extend(number + again * rows for number in numbers)
            self.tokens.extend(tokens)
            self.tiles.extend(tiles)

    def survey(self, rows: int) -> Survey:
        columns = (self.numbers, self.tokens, self.tiles)
        return Survey(
            rows,
            tuple(self.faults.kept),
            self.faults.more,
            tuple(self.notes.kept),
            self.notes.more,
            self.left_out,
            self.shortened,
            Sizes(*(np.array(column) for column in columns)),
        )


def survey(data: Data, maker: Maker) -> Iterator[Look]:
    """Look at every row, its pictures' headers included; yield after each, the last with all."""
    surveyor, total, first = Surveyor(maker), len(data), 0
    for source in data.sources:
        known = len(surveyor.numbers)
        for number in range(first, first + len(source.taken)):
            surveyor.see(data[number])
            yield Look(number + 1, total)
        surveyor.repeat(known, len(source.taken), source.passes)
        first += len(source)
    yield Look(total, total, surveyor.survey(total))


def checked(data: Data, maker: Maker) -> Survey:
    """Look at every row and return what was found."""
    *_, last = survey(data, maker)
    assert last.survey is not None
    return last.survey
