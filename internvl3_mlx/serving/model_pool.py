"""The models of an engine: loaded when they are asked for, put away when memory or time asks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from internvl3_mlx.serving.counters import Counters
from internvl3_mlx.serving.memory_budget import MemoryBudget
from internvl3_mlx.serving.prefix_cache import PrefixCache
from internvl3_mlx.serving.served_model import LoadedParts, ServedModel


@dataclass(eq=False)
class ModelPool:
    """All models by name. max_loaded: how many are in memory at once. idle_timeout_s: see settings.

    ``live_nbytes``: what the requests in progress take at most, beside the weights.
    """

    models: Mapping[str, ServedModel]
    budget: MemoryBudget
    prefixes: PrefixCache
    counters: Counters
    max_loaded: int
    idle_timeout_s: float | None
    live_nbytes: int = 0

    @property
    def loaded(self) -> list[ServedModel]:
        return [served for served in self.models.values() if served.parts]

    @property
    def is_busy(self) -> bool:
        return any(served.is_busy for served in self.models.values())

    @property
    def weights_nbytes(self) -> int:
        return sum(served.nbytes for served in self.loaded)

    def fits(self, nbytes: int) -> bool:
        """Tell whether ``nbytes`` more fit beside weights and requests in progress."""
        return self.weights_nbytes + self.live_nbytes + nbytes <= self.budget.limit_nbytes

    def load(self, served: ServedModel) -> LoadedParts:
        if served.parts is None:
            self.counters.add("model_loads")
        return served.load()

    def unload(self, served: ServedModel) -> None:
        """Free the weights of a model, and what was read with it."""
        self.prefixes.drop(served.name)
        served.put_away()

    def make_room(self, wanted: ServedModel) -> bool:
        """Put idle models away until ``wanted`` fits; return False to wait for busy ones.

        A model that was never loaded is of unknown size: only the number of models counts then.
        """
        for served in sorted(self.loaded, key=lambda one: one.last_used):
            if self.has_room(wanted):
                return True
            if not served.is_busy:
                self.unload(served)
        return self.has_room(wanted) or not self.loaded

    def has_room(self, wanted: ServedModel) -> bool:
        if wanted.parts is not None:
            return True
        return len(self.loaded) < self.max_loaded and self.fits(wanted.known_nbytes)

    def shrink_prefixes(self) -> None:
        """Leave the prefix cache what weights and requests in progress do not need."""
        free = self.budget.limit_nbytes - self.weights_nbytes - self.live_nbytes
        self.prefixes.shrink(max(min(self.prefixes.limit_nbytes, free), 0))

    def find_idle(self) -> list[str]:
        """Name the models that nobody has asked for in a while."""
        now, found = time.monotonic(), list[str]()
        for served in self.loaded if self.idle_timeout_s is not None else ():
            if served.is_busy:
                served.last_used = now
            elif now - served.last_used >= self.idle_timeout_s:  # type: ignore[operator]
                found.append(served.name)
        return found

    def seconds_to_idle(self, longest: float) -> float:
        """Return when the next model may have been idle long enough, ``longest`` at most."""
        if self.idle_timeout_s is None or not self.loaded:
            return longest
        first = min(served.last_used for served in self.loaded) + self.idle_timeout_s
        return min(max(first - time.monotonic(), 0.0), longest)
