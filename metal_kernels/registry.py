"""What is saved between starts: which kernels work on this machine, and where they are faster."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from internvl3_mlx.device import macos_version
from internvl3_mlx.errors import WriteError
from internvl3_mlx.files import atomic_write, cache_folder, content_digest
from internvl3_mlx.json_files import read_json_leniently
from internvl3_mlx.metal_kernels import dispatch

FOLDER = "kernels"  # of the cache folder
SELF_TESTS_FILE, THRESHOLDS_FILE = "self_tests.json", "thresholds.json"


def read_record(name: str) -> dict[str, Any]:
    """Return the content of a file; {} if it was written in another environment."""
    record = read_json_leniently(cache_folder(FOLDER) / name)
    content = record.get("content") if record.get("environment") == environment_key() else None
    return content if isinstance(content, dict) else {}


def write_record(name: str, content: dict[str, Any]) -> bool:
    """Replace a file; return False where it cannot be written, which costs nothing but time."""
    record = {"environment": environment_key(), "content": content}
    path = cache_folder(FOLDER) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=False) as part:
            part.write_text(json.dumps(record, indent=1), "utf-8")
    except (OSError, WriteError):
        return False
    return True


def environment_key() -> dict[str, str]:
    """Return all that a result depends on.

    The GPU; macOS, which brings Metal's compiler and driver; MLX; and the kernels.
    """
    return {
        "device": dispatch.device_name(),
        "architecture": dispatch.architecture(),
        "macos": macos_version(),
        "mlx": str(getattr(mx, "__version__", "unknown")),
        "kernels": kernels_digest(),
    }


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """Return a digest of this package: shaders, how they are launched, and how they are tested.

    Whatever shapes a kernel's text is here, so that no constant can be forgotten.
    """
    sources = [
        file.read_bytes()
        for folder in (files(__package__), files(__package__) / "shaders")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith((".py", ".metal"))
    ]
    return content_digest(*sources, size=8)


@dataclass(frozen=True)
class KernelThreshold:
    """From how many tokens on a kernel is faster than MLX's operations; None: nowhere.

    ``bits``: 16 for a dense cache; ``rows``: query heads per key-value head.
    """

    kernel: str
    bits: int
    head_dim: int
    rows: int
    min_tokens: int | None = None

    @property
    def key(self) -> str:
        """The name of this case in the file."""
        return f"{self.kernel}, {self.bits} bits, head_dim {self.head_dim}, {self.rows} rows"


def is_faster(key: str, tokens: int) -> bool:
    """Return whether the kernel was measured to be faster at this many tokens."""
    start = read_thresholds().get(key)
    return start is not None and tokens >= start


@lru_cache(maxsize=1)
def read_thresholds() -> dict[str, int]:
    """Read the file once: key -> smallest number of tokens at which the kernel is faster.

    Empty where nothing was measured or nothing is faster: then no token costs a look-up.
    """
    content = read_record(THRESHOLDS_FILE)
    return {key: start for key, start in content.items() if isinstance(start, int)}


def write_thresholds(thresholds: Iterable[KernelThreshold]) -> bool:
    """Replace the thresholds of this machine; return False where they cannot be written."""
    written = write_record(
        THRESHOLDS_FILE, {threshold.key: threshold.min_tokens for threshold in thresholds}
    )
    read_thresholds.cache_clear()
    return written
