"""A micro-batch: samples concatenated into one packed sequence, without padding."""

from dataclasses import dataclass, replace

import numpy as np

from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.models.packed_sequences import Span


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read and was left out. location: file and line. error: why."""

    location: str
    error: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to sample answers to, which ends with the opening of the assistant's turn.

    input_ids: (L,) int32. positions: (L,) float32. images: in the order of their tokens. expected:
    the answer of the record. answer_limit: the most tokens that an answer may have.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    images: tuple[ProcessedImage, ...]
    location: str
    expected: str
    answer_limit: int


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What is known of the sampled answers of a batch.

    advantages, weights: (num_answers,) float32, of the answers in the batch; those of weight 0 are
    not learned from. rewards: (R,) float32, of all sampled answers. zero_variance: the share of
    groups whose rewards are all the same, which are left out. mean_length: tokens of an answer.
    old_log_probs: (N,) under the weights that sampled; None if those are the current ones.
    """

    advantages: np.ndarray
    weights: np.ndarray
    rewards: np.ndarray
    zero_variance: float
    mean_length: float
    old_log_probs: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """One sequence of L tokens, cut into spans, with N target tokens that carry loss.

    input_ids: (L,) int32. positions: (L,) float32, restarting at 0 with each sample (V2PE steps
    inside images). spans: cover the sequence in order. target_positions: (N,) int32, the token
    whose state predicts each target. targets: (N,) int32. answer_ids: (N,) int32, the answer each
    target belongs to, from 0 to num_answers - 1: one per sample for SFT; for preferences 2i is the
    chosen and 2i + 1 the rejected answer of pair i. loss_weights: (N,) float32, the weight of each
    target in the SFT loss (token, sample or square averaging). images: in the order of their
    tokens. locations: where in the data each sample comes from, as "file:line". left_out: records
    that belong here and could not be read. labels: for unpaired preferences, whether the answer of
    each sample is desirable. With several samples, answer 2i is then that of sample i, and 2i + 1
    the answer of the next sample, put after the prompt of sample i. prompts: to sample answers to.
    rollouts: what is known of the answers, if they were sampled.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    spans: tuple[Span, ...]
    target_positions: np.ndarray
    targets: np.ndarray
    answer_ids: np.ndarray
    loss_weights: np.ndarray
    num_answers: int
    images: tuple[ProcessedImage, ...]
    locations: tuple[str, ...]
    left_out: tuple[BadRecord, ...] = ()
    labels: tuple[bool, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    rollouts: Rollouts | None = None


def chosen_only(batch: Batch) -> Batch:
    """Drop the rejected answer of each pair: the second of the two spans that share a prompt."""
    keep = np.ones(len(batch.input_ids), bool)
    rejected = [span for span in batch.spans if span.prefix is not None][1::2]
    for span in rejected:
        keep[span.start : span.stop] = False
    new_index, is_chosen = np.cumsum(keep) - 1, np.asarray(batch.answer_ids) % 2 == 0
    return replace(
        batch,
        input_ids=np.asarray(batch.input_ids)[keep],
        positions=np.asarray(batch.positions)[keep],
        spans=tuple(remap_span(span, new_index) for span in batch.spans if span not in rejected),
        target_positions=new_index[np.asarray(batch.target_positions)[is_chosen]],
        targets=np.asarray(batch.targets)[is_chosen],
        answer_ids=np.asarray(batch.answer_ids)[is_chosen],
        loss_weights=np.asarray(batch.loss_weights)[is_chosen],
    )


def remap_span(span: Span, new_index: np.ndarray) -> Span:
    """Move a span to where its tokens are after others were dropped. new_index: (L,)."""

    def remap(start: int, stop: int) -> tuple[int, int]:
        return int(new_index[start]), int(new_index[stop - 1]) + 1

    return Span(*remap(span.start, span.stop), span.prefix and remap(*span.prefix))
