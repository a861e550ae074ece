"""One question of a benchmark, and a source that gives them one at a time."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Protocol

from internvl3_mlx.images.load import ImageSource

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class EvalItem:
    """A question with its images and its true answers.

    options: letter to text. kind: what the data calls the type of the question, such as ``open`` or
    ``HME100k``. precision: decimals of a number. group: what the item shares with those that must
    be scored together. box: the true region in fractions of the image. clip: seconds of a video.
    fields: what the data says beside, for scores by category.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[ImageSource, ...] = ()
    videos: tuple[str | Path | bytes, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    hint: str = ""
    category: str = ""
    group: str = ""
    kind: str = ""
    answer_type: str = ""
    precision: int | None = None
    box: Box | None = None
    clip: tuple[float, float] | None = None


class ItemSource(Protocol):
    """Items by number. ``entries`` has what is known of each without opening its images."""

    @property
    def description(self) -> Mapping[str, object]:
        """What the data are: a path with a digest, or a name with a seed."""
        ...

    @property
    def entries(self) -> Sequence["Entry"]: ...

    def __getitem__(self, number: int) -> EvalItem: ...


@dataclass(frozen=True)
class Entry:
    """What is known of an item in advance. ``number``: its place in the source."""

    number: int
    id: str
    category: str = ""
    group: str = ""


@dataclass(frozen=True, eq=False)
class SelectedItems:
    """Some items of a source, in its order."""

    source: ItemSource
    entries: Sequence[Entry]

    @property
    def description(self) -> Mapping[str, object]:
        return self.source.description

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[EvalItem]:
        return (self.source[entry.number] for entry in self.entries)

    def __getitem__(self, number: int) -> EvalItem:
        return self.source[self.entries[number].number]


def select_items(source: ItemSource, limit: int | None, seed: int) -> SelectedItems:
    """Select at most ``limit`` items at random, each category by its share.

    Items of one group are taken together, so fewer may be selected. The same seed selects the same
    items.
    """
    entries = source.entries
    if limit is None or limit >= len(entries):
        return SelectedItems(source, entries)
    categories: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        categories[entry.category][entry.group or entry.id].append(entry)
    chosen: list[Entry] = []
    for name, share in _shares(categories, limit, len(entries)).items():
        groups = [*categories[name].values()]
        random.Random(f"{seed} {name}").shuffle(groups)
        for group in groups:
            if len(group) <= share:
                chosen += group
                share -= len(group)
    return SelectedItems(source, sorted(chosen, key=lambda entry: entry.number))


def _shares(
    categories: Mapping[str, Mapping[str, list[Entry]]], limit: int, total: int
) -> dict[str, int]:
    """Divide ``limit`` among categories by their size, the largest remainders rounded up."""
    sizes = {name: sum(map(len, groups.values())) for name, groups in categories.items()}
    shares = {name: limit * size // total for name, size in sizes.items()}
    remainders = sorted(sizes, key=lambda name: (-(limit * sizes[name] % total), name))
    for name in remainders[: limit - sum(shares.values())]:
        shares[name] += 1
    return shares


@dataclass(frozen=True, eq=False)
class RotatedItems:
    """Each multiple-choice item once for every rotation of its options (MMBench's CircularEval).

    turns: an item, and how many letters its options are moved.
    """

    source: ItemSource
    turns: Sequence[tuple[Entry, int]]

    @property
    def description(self) -> Mapping[str, object]:
        return self.source.description

    @property
    def entries(self) -> list[Entry]:
        return [
            Entry(number, rotated_id(entry.id, turn), entry.category, entry.id)
            for number, (entry, turn) in enumerate(self.turns)
        ]

    def __getitem__(self, number: int) -> EvalItem:
        entry, turn = self.turns[number]
        return rotate_options(self.source[entry.number], turn)


def rotate_all(source: ItemSource, option_counts: Sequence[int]) -> RotatedItems:
    """Rotate the options of every item through all letters that it has."""
    pairs = zip(source.entries, option_counts, strict=True)
    return RotatedItems(
        source, [(entry, turn) for entry, count in pairs for turn in range(max(1, count))]
    )


def rotated_id(item_id: str, turn: int) -> str:
    return f"{item_id}+{turn}" if turn else item_id


def rotate_options(item: EvalItem, turn: int) -> EvalItem:
    """Move every option ``turn`` letters on, the last ones to the front."""
    letters = [*item.options]
    texts = [item.options[letter] for letter in letters]
    moved = {letter: letters[(n + turn) % len(letters)] for n, letter in enumerate(letters)}
    options = {letters[(n + turn) % len(letters)]: text for n, text in enumerate(texts)}
    return replace(
        item,
        id=rotated_id(item.id, turn),
        group=item.id,
        options={letter: options[letter] for letter in letters},
        answers=tuple(moved.get(answer, answer) for answer in item.answers),
    )


LETTERS = tuple(ascii_uppercase)
