"""What the losses of a run say about its health: a bad update, or a run that has diverged.

A loss is bad if it is NaN or infinite, or far above what is usual: ``SPIKE_FACTOR`` times the
median of the last good ones, and at least ``SPIKE_MARGIN`` above it. A gradient of exactly 0 is bad
too, unless there is nothing left to learn: the logits have overflowed. Hard samples do that for one
update; five bad ones in a row mean that the weights are broken. Everything here follows from losses
and gradients alone, so a resumed run decides as the undisturbed one does.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

SPIKE_FACTOR, SPIKE_MARGIN = 2.0, 1.0  # relative to the usual loss; above it, in nats
WINDOW = 50  # good losses that are remembered
LEARNED = 0.1  # a loss below it may have no gradient
FEW = 8  # with fewer, the highest of them counts as usual
MAX_BAD_UPDATES = 5  # in a row: the run has diverged
MAX_BAD_AT_END = 1  # a run whose last updates were bad has not ended well


@dataclass(frozen=True)
class LossHistory:
    """The health of a run after an update.

    recent: the last good losses, oldest first. bad_updates: in a row, up to now. first_bad: the
    first of them. step_backs: how often the run has gone back to an earlier checkpoint.
    """

    recent: tuple[float, ...] = ()
    bad_updates: int = 0
    first_bad: int = 0
    step_backs: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossHistory":
        """Read what ``to_dict`` gave."""
        return cls(**{**values, "recent": tuple(values.get("recent", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Return values that JSON can hold, exactly."""
        return asdict(self)

    @property
    def is_good(self) -> bool:
        """Whether the last update was good, so that its weights may be saved."""
        return not self.bad_updates

    @property
    def has_diverged(self) -> bool:
        return self.bad_updates >= MAX_BAD_UPDATES

    @property
    def limit(self) -> float:
        """The loss above which an update is bad."""
        if not self.recent:
            return math.inf
        usual = max(self.recent) if len(self.recent) < FEW else median(self.recent)
        return max(SPIKE_FACTOR * usual, usual + SPIKE_MARGIN)

    def after(
        self, update: int, loss: float, grad_norm: float, *, ignore: bool = False
    ) -> "LossHistory":
        """Return the history after an update. ignore: only NaN and infinity are bad."""
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_dead = grad_norm == 0 and loss > LEARNED
        if is_finite and (ignore or (loss <= self.limit and not is_dead)):
            return replace(self, recent=(*self.recent, loss)[-WINDOW:], bad_updates=0, first_bad=0)
        first = self.first_bad or update
        return replace(self, bad_updates=self.bad_updates + 1, first_bad=first)
