"""One sample written out for a person to read, with what is learned told from what is not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.data.collate import Corpus
from internvl3_mlx.training.data.preprocess import Pair

Kind = Literal["text", "picture", "chosen", "rejected"]


@dataclass(frozen=True)
class Stretch:
    """Tokens of one kind that follow each other. ``text``: what they say, special tokens spelled
    out; the tokens of a picture are only counted."""

    text: str
    learned: bool
    kind: Kind
    tokens: int


@dataclass(frozen=True)
class Example:
    """A sample as it is trained on. ``place``: its file and line."""

    place: str
    stretches: tuple[Stretch, ...]

    @property
    def tokens(self) -> int:
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def learned(self) -> int:
        return sum(stretch.tokens for stretch in self.stretches if stretch.learned)


def example(corpus: Corpus, number: int = 0) -> Example:
    """Write out the sample of the ``number``-th usable row."""
    maker, entry = corpus.maker, corpus.data[int(corpus.sizes.numbers[number])]
    tokenizer = maker.preparer.tokenizer
    if not maker.settings.pairs:
        sample = maker.sample(entry)
        return Example(entry.place, tuple(stretches(tokenizer, sample.ids, sample.supervised)))
    pair = maker.pair(entry)
    return Example(entry.place, tuple(of_pair(tokenizer, pair)))


def of_pair(tokenizer: Tokenizer, pair: Pair) -> Iterator[Stretch]:
    yield from stretches(tokenizer, pair.prompt.ids, pair.prompt.supervised)
    yield Stretch(spelled(tokenizer, pair.chosen), True, "chosen", len(pair.chosen))
    yield Stretch(spelled(tokenizer, pair.rejected), True, "rejected", len(pair.rejected))


def stretches(tokenizer: Tokenizer, ids: np.ndarray, learned: np.ndarray) -> Iterator[Stretch]:
    """Split ids where learning begins or ends, and around pictures."""
    picture = ids == tokenizer.image_id
    kinds = 2 * picture + learned
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        count = int(stop - start)
        if picture[start]:
            yield Stretch(f"{count:,} tokens", False, "picture", count)
        else:
            text = spelled(tokenizer, ids[start:stop])
            yield Stretch(text, bool(learned[start]), "text", count)


def spelled(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Turn ids into text, special tokens written out."""
    names = {token.id: text for text, token in tokenizer.added.items()}
    special = np.isin(ids, list(names))
    starts = np.flatnonzero(np.diff(special, prepend=not special[0]))
    parts = np.split(ids, starts[1:])
    return "".join(
        "".join(names[int(n)] for n in part) if int(part[0]) in names else tokenizer.decode(part)
        for part in parts
    )
