"""One measurement: the time, the bytes and operations, and what the machine needs at least."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from internvl3_mlx.profiling.limits import MachineLimits


@dataclass(frozen=True)
class Measurement:
    """``seconds`` is None where nothing could be measured; ``why`` gives the reason.

    ``nbytes`` and ``flops`` are counted from the shapes: the least that the work needs, however it
    is done. ``peer``: the seconds of MLX's own operations for the same result, if there are any.
    ``plan``: how a kernel's work was split, if another way than the usual one was fastest.
    """

    group: str
    name: str
    context: int
    seconds: float | None
    nbytes: float
    flops: float
    peer: float | None = None
    why: str = ""
    plan: str = ""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.nbytes

    def share_of_limit(self, limits: MachineLimits) -> float | None:
        """Return the share of the machine's limit that was reached, up to 1."""
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
    """A measurement to be taken."""

    name: str
    measure: Callable[[], Measurement]
