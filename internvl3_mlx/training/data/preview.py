"""Decode one sample for a person to read, and mark which of its tokens are trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.batch import Prompt
from internvl3_mlx.training.data.collate import BatchedDataset
from internvl3_mlx.training.data.preprocess import (
    PreferencePair,
    TrainingSample,
    UnpairedPreference,
)

SpanKind = Literal["text", "image", "chosen", "rejected", "desirable", "undesirable", "expected"]


@dataclass(frozen=True)
class PreviewSpan:
    """Consecutive tokens of one kind.

    text: the decoded tokens, special tokens included; for an image only their number.
    """

    text: str
    in_loss: bool
    kind: SpanKind
    tokens: int


@dataclass(frozen=True)
class SamplePreview:
    """A sample as it is trained on. location: file and line of its record."""

    location: str
    spans: tuple[PreviewSpan, ...]

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def loss_tokens(self) -> int:
        return sum(span.tokens for span in self.spans if span.in_loss)


def preview_sample(dataset: BatchedDataset, number: int = 0) -> SamplePreview:
    """Decode the sample of the ``number``-th usable record."""
    preprocessor = dataset.preprocessor
    record = dataset.dataset[int(dataset.sizes.indices[number])]
    tokenizer = preprocessor.tokenizer
    sample = preprocessor.build(record)
    if isinstance(sample, TrainingSample):
        spans = split_spans(tokenizer, sample.input_ids, sample.loss_mask)
    elif isinstance(sample, Prompt):
        spans = preview_prompt(tokenizer, sample)
    else:
        spans = preview_preference(tokenizer, sample)
    return SamplePreview(record.location, tuple(spans))


def preview_prompt(tokenizer: Tokenizer, prompt: Prompt) -> Iterator[PreviewSpan]:
    yield from split_spans(tokenizer, prompt.input_ids, np.zeros(len(prompt.input_ids), bool))
    yield PreviewSpan(prompt.expected, False, "expected", 0)


def preview_preference(
    tokenizer: Tokenizer, sample: PreferencePair | UnpairedPreference
) -> Iterator[PreviewSpan]:
    answers: dict[SpanKind, np.ndarray]
    if isinstance(sample, PreferencePair):
        answers = {"chosen": sample.chosen, "rejected": sample.rejected}
    else:
        answers = {"desirable" if sample.desirable else "undesirable": sample.answer}
    yield from split_spans(tokenizer, sample.prompt.input_ids, sample.prompt.loss_mask)
    for kind, answer in answers.items():
        yield PreviewSpan(decode_with_specials(tokenizer, answer), True, kind, len(answer))


def split_spans(
    tokenizer: Tokenizer, input_ids: np.ndarray, loss_mask: np.ndarray
) -> Iterator[PreviewSpan]:
    """Split (L,) ids where the (L,) loss mask changes, and around images."""
    is_image = input_ids == tokenizer.image_id
    starts = np.flatnonzero(np.diff(2 * is_image + loss_mask, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(input_ids)], strict=True):
        count = int(stop - start)
        if is_image[start]:
            yield PreviewSpan(f"{count:,} tokens", False, "image", count)
        else:
            text = decode_with_specials(tokenizer, input_ids[start:stop])
            yield PreviewSpan(text, bool(loss_mask[start]), "text", count)


def decode_with_specials(tokenizer: Tokenizer, input_ids: np.ndarray) -> str:
    """Decode (L,) ids, special tokens included."""
    names = {token.id: text for text, token in tokenizer.added.items()}
    is_special = np.isin(input_ids, list(names))
    starts = np.flatnonzero(np.diff(is_special, prepend=not is_special[0]))
    parts = np.split(input_ids, starts[1:])
    return "".join(
        "".join(names[int(n)] for n in part) if int(part[0]) in names else tokenizer.decode(part)
        for part in parts
    )
