"""One measured line: how long, how much was moved and computed, and what the machine would need."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from internvl3_mlx.profiling.limits import MachineLimits


@dataclass(frozen=True)
class Measurement:
    """``seconds`` is None where nothing could be measured; ``why`` says the reason.

    ``nbytes`` and ``flops`` are counted from the shapes: what the work needs at the least, however
    it is done. ``peer``: the seconds of MLX's own way to the same result, where there is one.
    """

    group: str
    name: str
    context: int
    seconds: float | None
    nbytes: float
    flops: float
    peer: float | None = None
    why: str = ""

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.nbytes

    def share_of_limit(self, limits: MachineLimits) -> float | None:
        """Return what part of the machine's limit was reached, 1 for all of it."""
        if self.seconds is None:
            return None
        return limits.min_seconds(self.nbytes, self.flops) / self.seconds

    def to_dict(self, limits: MachineLimits) -> dict[str, Any]:
        ratio = self.peer / self.seconds if self.peer and self.seconds else None
        limit = limits.min_seconds(self.nbytes, self.flops)
        return {
            **asdict(self),
            "limit_s": limit,
            "share": self.share_of_limit(limits),
            "ratio": ratio,
        }


class MeasurementTask(NamedTuple):
    """One figure still to be measured."""

    name: str
    measure: Callable[[], Measurement]
