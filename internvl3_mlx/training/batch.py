"""What one micro-step reads: some samples laid end to end in one row, nothing padded."""

from dataclasses import dataclass

import numpy as np

from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.models.packed_sequences import Span


@dataclass(frozen=True, eq=False)
class Batch:
    """One row of L tokens in spans, of which N targets are supervised.

    ids: (L,) int32. positions: (L,) float32, each sample from 0 on (V2PE steps in pictures).
    spans cover the row in order. rows: (N,) int32, the token whose state predicts each target.
    targets: (N,) int32. owner: (N,) int32, the answer each target belongs to, 0 to answers - 1: for
    SFT one a sample; for preferences 2i is pair i's chosen answer and 2i + 1 its rejected one.
    weights: (N,) float32, what each target counts in the SFT loss (token, sample or square).
    seen: the pictures in the order of their tokens. places: where each sample stands in the data.
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
