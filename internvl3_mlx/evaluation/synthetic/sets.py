"""The rendered sets as items: image n of a set follows from the seed, the set and n alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from types import MappingProxyType
from typing import Any

from internvl3_mlx.errors import DataError, UserError
from internvl3_mlx.evaluation.items import Entry, EvalItem
from internvl3_mlx.evaluation.synthetic.charts import render_bars, render_line
from internvl3_mlx.evaluation.synthetic.fonts import FontFace, describe_fonts, find_fonts
from internvl3_mlx.evaluation.synthetic.numbers import load_series
from internvl3_mlx.evaluation.synthetic.question import RenderedQuestion
from internvl3_mlx.evaluation.synthetic.scenes import (
    render_counting,
    render_difference,
    render_position,
)
from internvl3_mlx.evaluation.synthetic.words import render_page, render_table, render_word
from internvl3_mlx.files import content_digest, did_you_mean

VERSION = 1  # raised when a set renders other images for the same seed
Renderer = Callable[[Random, tuple[FontFace, ...]], RenderedQuestion]
SETS: Mapping[str, tuple[Renderer, str]] = MappingProxyType({
    "words": (render_word, "one word, in many fonts and sizes"),
    "page": (render_page, "a line of a page of text"),
    "table": (render_table, "a number in a table"),
    "bars": (render_bars, "a value, or the highest, of a bar chart"),
    "line": (render_line, "where a line chart is highest"),
    "counting": (render_counting, "how many shapes of a kind"),
    "position": (render_position, "shape or color in a corner"),
    "difference": (render_difference, "which shape is only in the second of two images"),
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class SyntheticItems:
    """Rendered items of some sets, ``count`` of each, one set after the other."""

    names: Sequence[str]
    count: int
    seed: int
    only_pillow: bool = False

    @staticmethod
    def from_description(data: Mapping[str, Any]) -> "SyntheticItems":
        """Return the items of a saved run; raises ``DataError`` where they would look different."""
        items = SyntheticItems(
            data["set"], data["count"], data["set_seed"], only_pillow=data["only_pillow"]
        )
        if items.description["digest"] != data["digest"]:
            raise DataError("the fonts or the numbers of this machine have changed since the run")
        return items

    @property
    def fonts(self) -> tuple[FontFace, ...]:
        return find_fonts(self.only_pillow)

    @cached_property
    def description(self) -> Mapping[str, object]:
        """The sets with everything that decides how they look."""
        import PIL

        content: dict[str, object] = {
            "set": [*self.names],
            "count": self.count,
            "set_seed": self.seed,
            "only_pillow": self.only_pillow,
            "version": VERSION,
            "pillow": PIL.__version__,
            "numbers": load_series()[0],
            **describe_fonts(self.fonts),
        }
        return {**content, "digest": content_digest(repr(content))}

    @cached_property
    def entries(self) -> list[Entry]:
        pairs = [(name, number) for name in self.names for number in range(self.count)]
        return [
            Entry(place, f"{name}-{number}", name) for place, (name, number) in enumerate(pairs)
        ]

    def __getitem__(self, number: int) -> EvalItem:
        entry = self.entries[number]
        render, _ = SETS[entry.category]
        found = render(Random(f"{VERSION} {self.seed} {entry.id}"), self.fonts)
        return EvalItem(
            id=entry.id,
            question=found.question,
            answers=found.answers,
            images=found.images,
            category=entry.category,
            kind=found.kind,
        )


def check_sets(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, all sets for none; raise UserError for an unknown one."""
    for name in names:
        if name not in SETS:
            raise UserError(f"unknown set {name!r}; {did_you_mean(name, SETS)}")
    return tuple(dict.fromkeys(names)) or tuple(SETS)
