"""One measured line: how long, how much was moved and computed, and what the machine would need."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from internvl3_mlx.profiling.limits import Limits


@dataclass(frozen=True)
class Figure:
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

    def share(self, limits: Limits) -> float | None:
        """Return what part of the machine's limit was reached, 1 for all of it."""
        if self.seconds is None:
            return None
        return limits.seconds(self.nbytes, self.flops) / self.seconds

    def to_dict(self, limits: Limits) -> dict[str, Any]:
        ratio = self.peer / self.seconds if self.peer and self.seconds else None
        limit = limits.seconds(self.nbytes, self.flops)
        return {**asdict(self), "limit_s": limit, "share": self.share(limits), "ratio": ratio}


class Task(NamedTuple):
    """One figure still to be measured."""

    name: str
    measure: Callable[[], Figure]
