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

from internvl3_mlx.models.spans import Span
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.forward import own_tiles
from internvl3_mlx.training.objectives import MethodState
from internvl3_mlx.training.params import named
from internvl3_mlx.training.trainer import Found, Learner, Work, value_and_grad

ROUND_TOKENS, ROUND_TARGETS = 64, 32  # lengths and counts are multiples of these
VARYING = ("ids", "positions", "rows", "targets", "owner", "weights")  # arrays of a batch


@dataclass(eq=False)
class Compiled:
    """Computes what ``value_and_grad`` does. ``steps`` are the compiled ones, by shape."""

    learner: Learner
    steps: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, work: Work) -> Found:
        learner = self.learner
        batch = rounded(work.batch)
        vision = own_tiles(batch) if work.vision is None else work.vision
        shape = (batch.spans, len(batch.targets), None if vision is None else vision.shape)
        if shape not in self.steps:
            self.steps[shape] = self.compiled(batch)
        weights = dict(named(learner.model.trainable_parameters()))
        arrays = {name: mx.array(getattr(batch, name)) for name in VARYING}
        state = (learner.state.shift, learner.state.count)
        found: Found = self.steps[shape](weights, arrays, vision, state)
        learner.model.update(tree_unflatten([*weights.items()]))  # tracing left its own there
        return found

    def compiled(self, batch: Batch) -> Callable[..., Any]:
        """Compile the step for batches of this shape; their numbers come in as arguments."""
        learner, random = self.learner, [mx.random.state]
        bare = replace(batch, seen=())

        def step(weights: Any, arrays: Any, vision: Any, state: Any) -> Any:
            learner.model.update(tree_unflatten([*weights.items()]))
            work = Work(replace(bare, **arrays), vision)
            return value_and_grad(learner, MethodState(*state))(work)

        made: Callable[..., Any] = mx.compile(step, inputs=random, outputs=random)
        return made


def rounded(batch: Batch) -> Batch:
    """Lengthen every sample and the targets to round numbers; what they mean stays."""
    starts = [0]
    for span in batch.spans:
        starts.append(starts[-1] + round_up(span.stop - span.start, ROUND_TOKENS))
    spans = tuple(Span(start, stop) for start, stop in pairwise(starts))
    ids, positions = np.zeros(starts[-1], np.int32), np.zeros(starts[-1], np.float32)
    shift = np.zeros(len(batch.ids), np.int32)
    for own, new in zip(batch.spans, spans, strict=True):
        length = own.stop - own.start
        ids[new.start : new.start + length] = batch.ids[own.start : own.stop]
        positions[new.start : new.start + length] = batch.positions[own.start : own.stop]
        shift[own.start : own.stop] = new.start - own.start
    spare = round_up(len(batch.targets), ROUND_TARGETS) - len(batch.targets)
    return replace(
        batch,
        ids=ids,
        positions=positions,
        spans=spans,
        rows=np.pad(batch.rows + shift[batch.rows], (0, spare)),
        targets=np.pad(batch.targets, (0, spare)),
        owner=np.pad(batch.owner, (0, spare)),
        weights=np.pad(batch.weights, (0, spare)),
    )


def round_up(count: int, to: int) -> int:
    return -(-count // to) * to
