"""One sample written out for a person to read, with what is learned told from what is not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.data.collate import BatchedDataset
from internvl3_mlx.training.data.preprocess import PreferencePair

SpanKind = Literal["text", "picture", "chosen", "rejected"]


@dataclass(frozen=True)
class PreviewSpan:
    """Tokens of one kind that follow each other. ``text``: what they say, special tokens spelled
    out; the tokens of a picture are only counted."""

    text: str
    in_loss: bool
    kind: SpanKind
    tokens: int


@dataclass(frozen=True)
class SamplePreview:
    """A sample as it is trained on. ``place``: its file and line."""

    location: str
    spans: tuple[PreviewSpan, ...]

    @property
    def tokens(self) -> int:
        return sum(stretch.tokens for stretch in self.spans)

    @property
    def loss_tokens(self) -> int:
        return sum(stretch.tokens for stretch in self.spans if stretch.in_loss)


def preview_sample(dataset: BatchedDataset, number: int = 0) -> SamplePreview:
    """Write out the sample of the ``number``-th usable row."""
    maker, entry = dataset.preprocessor, dataset.dataset[int(dataset.sizes.indices[number])]
    tokenizer = maker.processor.tokenizer
    if not maker.config.reads_pairs:
        sample = maker.build_sample(entry)
        return SamplePreview(
            entry.location, tuple(split_spans(tokenizer, sample.input_ids, sample.loss_mask))
        )
    pair = maker.build_pair(entry)
    return SamplePreview(entry.location, tuple(preview_pair(tokenizer, pair)))


def preview_pair(tokenizer: Tokenizer, pair: PreferencePair) -> Iterator[PreviewSpan]:
    yield from split_spans(tokenizer, pair.prompt.input_ids, pair.prompt.loss_mask)
    yield PreviewSpan(
        decode_with_specials(tokenizer, pair.chosen), True, "chosen", len(pair.chosen)
    )
    yield PreviewSpan(
        decode_with_specials(tokenizer, pair.rejected), True, "rejected", len(pair.rejected)
    )


def split_spans(
    tokenizer: Tokenizer, input_ids: np.ndarray, loss_mask: np.ndarray
) -> Iterator[PreviewSpan]:
    """Split ids where learning begins or ends, and around pictures."""
    picture = input_ids == tokenizer.image_id
    kinds = 2 * picture + loss_mask
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(input_ids)], strict=True):
        count = int(stop - start)
        if picture[start]:
            yield PreviewSpan(f"{count:,} tokens", False, "picture", count)
        else:
            text = decode_with_specials(tokenizer, input_ids[start:stop])
            yield PreviewSpan(text, bool(loss_mask[start]), "text", count)


def decode_with_specials(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Turn ids into text, special tokens written out."""
    names = {token.id: text for text, token in tokenizer.added.items()}
    special = np.isin(ids, list(names))
    starts = np.flatnonzero(np.diff(special, prepend=not special[0]))
    parts = np.split(ids, starts[1:])
    return "".join(
        "".join(names[int(n)] for n in part) if int(part[0]) in names else tokenizer.decode(part)
        for part in parts
    )
