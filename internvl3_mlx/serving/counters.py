"""Counters of an engine, written by its threads and read by whoever asks."""

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock


@dataclass(eq=False)
class Counters:
    """Sums since the start, by name; ``finished`` and ``rejected`` by kind."""

    sums: dict[str, float] = field(default_factory=dict[str, float])
    finished: Counter[str] = field(default_factory=Counter[str])
    rejected: Counter[str] = field(default_factory=Counter[str])
    lock: Lock = field(default_factory=Lock)

    def add(self, name: str, value: float = 1) -> None:
        with self.lock:
            self.sums[name] = self.sums.get(name, 0) + value

    def count_finished(self, how: str) -> None:
        with self.lock:
            self.finished[how] += 1

    def count_rejected(self, error: BaseException) -> None:
        with self.lock:
            self.rejected[type(error).__name__] += 1

    def get(self, name: str) -> float:
        return self.sums.get(name, 0)
