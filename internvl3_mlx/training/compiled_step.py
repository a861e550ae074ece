"""A micro-step that MLX compiles, once for each shape; samples are rounded up to few shapes.

Every sample gets padding behind it up to a round length, and the targets some that weigh nothing:
attention is causal, so that no token of a sample ever sees what is behind it.
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

TOKEN_MULTIPLE, TARGET_MULTIPLE = 64, 32  # lengths and counts are multiples of these
BATCH_ARRAYS = ("ids", "positions", "rows", "targets", "owner", "weights")  # arrays of a batch


@dataclass(eq=False)
class CompiledStep:
    """Computes what ``value_and_grad`` does. ``steps`` are the compiled ones, by shape."""

    state: TrainState
    by_shape: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, work: MicroBatch) -> StepOutput:
        learner = self.state
        batch = pad_batch(work.batch)
        vision = batch_tiles(batch) if work.vision_features is None else work.vision_features
        shape = (batch.spans, len(batch.targets), None if vision is None else vision.shape)
        if shape not in self.by_shape:
            self.by_shape[shape] = self.compile_step(batch)
        weights = dict(named_arrays(learner.model.trainable_parameters()))
        arrays = {name: mx.array(getattr(batch, name)) for name in BATCH_ARRAYS}
        state = (learner.objective_state.shift, learner.objective_state.count)
        found: StepOutput = self.by_shape[shape](weights, arrays, vision, state)
        learner.model.update(tree_unflatten([*weights.items()]))  # tracing left its own there
        return found

    def compile_step(self, batch: Batch) -> Callable[..., Any]:
        """Compile the step for batches of this shape; their numbers come in as arguments."""
        learner, random = self.state, [mx.random.state]
        bare = replace(batch, images=())

        def step(weights: Any, arrays: Any, vision: Any, state: Any) -> Any:
            learner.model.update(tree_unflatten([*weights.items()]))
            work = MicroBatch(replace(bare, **arrays), vision)
            return loss_and_grads(learner, ObjectiveState(*state))(work)

        made: Callable[..., Any] = mx.compile(step, inputs=random, outputs=random)
        return made


def pad_batch(batch: Batch) -> Batch:
    """Lengthen every sample and the targets to round numbers; what they mean stays."""
    starts = [0]
    for span in batch.spans:
        starts.append(starts[-1] + round_up(span.stop - span.start, TOKEN_MULTIPLE))
    spans = tuple(Span(start, stop) for start, stop in pairwise(starts))
    ids, positions = np.zeros(starts[-1], np.int32), np.zeros(starts[-1], np.float32)
    shift = np.zeros(len(batch.input_ids), np.int32)
    for own, new in zip(batch.spans, spans, strict=True):
        length = own.stop - own.start
        ids[new.start : new.start + length] = batch.input_ids[own.start : own.stop]
        positions[new.start : new.start + length] = batch.positions[own.start : own.stop]
        shift[own.start : own.stop] = new.start - own.start
    spare = round_up(len(batch.targets), TARGET_MULTIPLE) - len(batch.targets)
    return replace(
        batch,
        input_ids=ids,
        positions=positions,
        spans=spans,
        target_positions=np.pad(batch.target_positions + shift[batch.target_positions], (0, spare)),
        targets=np.pad(batch.targets, (0, spare)),
        answer_ids=np.pad(batch.answer_ids, (0, spare)),
        loss_weights=np.pad(batch.loss_weights, (0, spare)),
    )


def round_up(count: int, to: int) -> int:
    return -(-count // to) * to
