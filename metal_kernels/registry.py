"""What is remembered between starts: which kernels work on this machine, and where they pay."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch, registry

SELF_TESTS_FILE, THRESHOLDS_FILE = "probes.json", "table.json"


def registry_folder() -> Path:
    """Return kernels/ in $INTERNVL3_CACHE, or in the user's cache folder."""
    if named := os.environ.get("INTERNVL3_CACHE"):
        return Path(named).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "internvl3-mlx" / "kernels"


def read_record(name: str) -> dict[str, Any]:
    """Read what a file says of this machine, MLX and kernels; nothing if it speaks of others."""
    try:
        content = json.loads((registry_folder() / name).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(content, dict) and content.get("of") == environment_key()
    found = content.get("holds") if fits else None
    return found if isinstance(found, dict) else {}


def write_record(name: str, content: dict[str, Any]) -> bool:
    """Write aside, then rename. False, and nothing lost but time, where the folder takes none."""
    path = registry_folder() / name
    unfinished = path.with_name(f"{name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(
            json.dumps({"of": environment_key(), "holds": content}, indent=1), "utf-8"
        )
        unfinished.replace(path)
    except OSError:
        return False
    return True


def environment_key() -> dict[str, str]:
    """Name all that a result depends on: the GPU, MLX, and the kernels' own text."""
    return {
        "device": dispatch.device_name(),
        "mlx": str(getattr(mx, "__version__", "unknown")),
        "kernels": shader_digest(),
    }


@lru_cache(maxsize=1)
def shader_digest() -> str:
    shaders = sorted((files(__package__) / "shaders").iterdir(), key=lambda file: file.name)
    texts = [file.read_bytes() for file in shaders if file.name.endswith(".metal")]
    return blake2b(b"".join(texts), digest_size=8).hexdigest()


@dataclass(frozen=True)
class KernelThreshold:
    """One measured case: the kernel pays from ``tokens`` on; None: nowhere.

    ``bits``: 16 for numbers that are not packed; ``rows``: query heads per key-value head.
    """

    kernel: str
    bits: int
    head_dim: int
    rows: int
    min_tokens: int | None = None

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.bits} bits, head_dim {self.head_dim}, {self.rows} rows"


def is_faster(key: str, tokens: int) -> bool:
    """Say whether the kernel was measured to be faster at this many tokens."""
    start = read_thresholds().get(key)
    return start is not None and tokens >= start


@lru_cache(maxsize=1)
def read_thresholds() -> dict[str, int]:
    """Read the table once: case -> first token count that pays. Empty where none was written, or
    nothing pays: then a token costs no look at our kernels."""
    found = registry.read_record(registry.THRESHOLDS_FILE)
    return {case: start for case, start in found.items() if isinstance(start, int)}


def write_thresholds(thresholds: Iterable[KernelThreshold]) -> bool:
    """Replace this machine's table; False where the cache folder cannot be written."""
    written = registry.write_record(
        registry.THRESHOLDS_FILE, {entry.key: entry.min_tokens for entry in thresholds}
    )
    read_thresholds.cache_clear()
    return written
