"""From how many tokens on a kernel pays, as measured on this very machine.

Nobody has timed these kernels on Apple hardware yet, so without a measurement none is taken:
MLX's own route stays. `internvl3 bench` measures both and writes the table; INTERNVL3_KERNELS=force
takes the kernels without one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from internvl3_mlx.metal_kernels import registry


@dataclass(frozen=True)
class Entry:
    """One measured case: the kernel pays from ``tokens`` on; None: nowhere.

    ``bits``: 16 for numbers that are not packed; ``rows``: query heads per key-value head.
    """

    kernel: str
    bits: int
    head_dim: int
    rows: int
    tokens: int | None = None

    @property
    def case(self) -> str:
        return f"{self.kernel}, {self.bits} bits, head_dim {self.head_dim}, {self.rows} rows"


def pays(case: str, tokens: int) -> bool:
    """Say whether the kernel was measured to be faster at this many tokens."""
    start = measured().get(case)
    return start is not None and tokens >= start


@lru_cache(maxsize=1)
def measured() -> dict[str, int]:
    """Read the table once: case -> first token count that pays. Empty where none was written, or
    nothing pays: then a token costs no look at our kernels."""
    found = registry.recall(registry.TABLE)
    return {case: start for case, start in found.items() if isinstance(start, int)}


def write_table(entries: Iterable[Entry]) -> bool:
    """Replace this machine's table; False where the cache folder cannot be written."""
    written = registry.remember(registry.TABLE, {entry.case: entry.tokens for entry in entries})
    measured.cache_clear()
    return written
