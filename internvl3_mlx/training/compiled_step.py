"""A micro-step compiled by MLX, once per shape; samples are padded to a small number of shapes.

Every sample is padded at its end to a multiple of ``TOKEN_MULTIPLE``, and the targets by some of
weight 0: attention is causal, so no token of a sample ever sees its padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from internvl3_mlx.models.packed_sequences import Span
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.forward import batch_tiles
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.trainer import MicroBatch, StepOutput, TrainState, loss_and_grads

TOKEN_MULTIPLE, TARGET_MULTIPLE = 64, 32
BATCH_ARRAYS = (
    "input_ids", "positions", "target_positions", "targets", "answer_ids", "loss_weights",
)  # fmt: skip


@dataclass(eq=False)
class CompiledStep:
    """Computes what ``loss_and_grads`` computes. by_shape: the compiled functions."""

    state: TrainState
    by_shape: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, micro_batch: MicroBatch) -> StepOutput:
        batch = pad_batch(micro_batch.batch)
        vision = micro_batch.vision_features
        vision = batch_tiles(batch) if vision is None else vision
        shape = (batch.spans, len(batch.targets), None if vision is None else vision.shape)
        if shape not in self.by_shape:
            self.by_shape[shape] = self.compile_step(batch)
        model, before = self.state.model, self.state.objective_state
        weights = dict(named_arrays(model.trainable_parameters()))
        arrays = {name: mx.array(getattr(batch, name)) for name in BATCH_ARRAYS}
        output: StepOutput = self.by_shape[shape](
            weights, arrays, vision, (before.shift, before.count)
        )
        model.update(tree_unflatten([*weights.items()]))  # tracing replaced them by its own
        return output

    def compile_step(self, batch: Batch) -> Callable[..., Any]:
        """Compile the step for batches of this shape; their arrays are arguments."""
        state, random_state = self.state, [mx.random.state]
        without_images = replace(batch, images=())

        def step(weights: Any, arrays: Any, vision: Any, objective_state: Any) -> Any:
            state.model.update(tree_unflatten([*weights.items()]))
            micro_batch = MicroBatch(replace(without_images, **arrays), vision)
            return loss_and_grads(state, ObjectiveState(*objective_state))(micro_batch)

        compiled: Callable[..., Any] = mx.compile(step, inputs=random_state, outputs=random_state)
        return compiled


def pad_batch(batch: Batch) -> Batch:
    """Pad every sample and the targets to round lengths, without changing the loss."""
    starts = [0]
    for span in batch.spans:
        starts.append(starts[-1] + round_up(span.stop - span.start, TOKEN_MULTIPLE))
    spans = tuple(Span(start, stop) for start, stop in pairwise(starts))
    ids, positions = np.zeros(starts[-1], np.int32), np.zeros(starts[-1], np.float32)
    offsets = np.zeros(len(batch.input_ids), np.int32)
    for old, new in zip(batch.spans, spans, strict=True):
        length = old.stop - old.start
        ids[new.start : new.start + length] = batch.input_ids[old.start : old.stop]
        positions[new.start : new.start + length] = batch.positions[old.start : old.stop]
        offsets[old.start : old.stop] = new.start - old.start
    extra = round_up(len(batch.targets), TARGET_MULTIPLE) - len(batch.targets)
    return replace(
        batch,
        input_ids=ids,
        positions=positions,
        spans=spans,
        target_positions=np.pad(
            batch.target_positions + offsets[batch.target_positions], (0, extra)
        ),
        targets=np.pad(batch.targets, (0, extra)),
        answer_ids=np.pad(batch.answer_ids, (0, extra)),
        loss_weights=np.pad(batch.loss_weights, (0, extra)),
    )


def round_up(count: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-count // multiple) * multiple
