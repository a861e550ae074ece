"""A micro-batch: samples concatenated into one packed sequence, without padding."""

from dataclasses import dataclass

import numpy as np

from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.models.packed_sequences import Span


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read and was left out. location: file and line. error: why."""

    location: str
    error: str


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
    that belong here and could not be read.
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
