"""What is saved between starts: which kernels work on this machine, and where they are faster."""

import json
from collections.abc import Iterable, Mapping
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
SELF_TESTS_FILE, SPEEDUPS_FILE = "self_tests.json", "speedups.json"
MIN_SPEEDUP = 1.05  # times faster, or MLX's operations are used: less may be noise


def read_record(name: str) -> dict[str, Any]:
    """Return the content of a file; {} if it was written in another environment."""
    record = read_json_leniently(cache_folder(FOLDER) / name)
    content = record.get("content") if record.get("environment") == environment_key() else None
    return content if isinstance(content, dict) else {}


def write_record(name: str, content: Mapping[str, Any]) -> bool:
    """Replace a file; return False where it cannot be written, which costs nothing but time."""
    record = {"environment": environment_key(), "content": dict(content)}
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
class KernelSpeedup:
    """How many times faster than MLX's operations a kernel was in one case; 0: not at all.

    ``plan``: the fastest plan of splits, by its name; "" for the usual one.
    """

    key: str
    tokens: int
    ratio: float
    plan: str = ""


Speedups = dict[str, dict[int, KernelSpeedup]]  # key of a case -> tokens -> what was measured


def is_faster(key: str, tokens: int) -> bool:
    """Return whether the kernel was faster at the longest length measured up to ``tokens``."""
    return key in faster_cases() and (nearest_ratio(key, tokens) or 0.0) >= MIN_SPEEDUP


def nearest_ratio(key: str, tokens: int) -> float | None:
    """Return the ratio at the longest length measured up to ``tokens``; None without one."""
    found = nearest_speedup(key, tokens)
    return None if found is None else found.ratio


def nearest_speedup(key: str, tokens: int) -> KernelSpeedup | None:
    """Return what was measured at the longest length up to ``tokens``; None if nothing was."""
    measured = read_speedups().get(key, {})
    nearest = max((length for length in measured if length <= tokens), default=None)
    return None if nearest is None else measured[nearest]


@lru_cache(maxsize=256)
def fastest_plan(key: str, tokens: int) -> str:
    """Return the name of the plan of splits that was fastest at this length; "" if none was."""
    found = nearest_speedup(key, tokens)
    return found.plan if found else ""


def is_measured(key: str, tokens: int) -> bool:
    """Return whether a case was measured at exactly this many tokens."""
    return tokens in read_speedups().get(key, {})


def faster_from(found: Mapping[int, KernelSpeedup]) -> int | None:
    """Return from how many tokens on a kernel was always faster; None: nowhere."""
    start = None
    for tokens in sorted(found, reverse=True):
        if found[tokens].ratio < MIN_SPEEDUP:
            break
        start = tokens
    return start


@lru_cache(maxsize=1)
def faster_cases() -> Speedups:
    """Return the cases in which a kernel is faster somewhere.

    Empty where nothing was measured or nothing is faster: then no token costs a look-up.
    """
    return {
        key: found
        for key, found in read_speedups().items()
        if any(one.ratio >= MIN_SPEEDUP for one in found.values())
    }


@lru_cache(maxsize=1)
def read_speedups() -> Speedups:
    """Read the file once."""
    content = read_record(SPEEDUPS_FILE)
    return {key: read_case(key, saved) for key, saved in content.items() if isinstance(saved, dict)}


def read_case(key: str, saved: Mapping[str, Any]) -> dict[int, KernelSpeedup]:
    """Return what was measured in one case, without what we did not write."""
    return {
        int(tokens): KernelSpeedup(key, int(tokens), float(one["ratio"]), str(one.get("plan", "")))
        for tokens, one in saved.items()
        if tokens.isdecimal()
        and isinstance(one, dict)
        and isinstance(one.get("ratio"), int | float)
    }


def add_speedups(found: Iterable[KernelSpeedup]) -> bool:
    """Add or replace what was measured; return False where it is lost with this process."""
    known = read_speedups()
    for one in found:
        known.setdefault(one.key, {})[one.tokens] = one
    faster_cases.cache_clear()
    fastest_plan.cache_clear()
    content = {
        key: {tokens: {"ratio": one.ratio, "plan": one.plan} for tokens, one in found.items()}
        for key, found in known.items()
    }
    return write_record(SPEEDUPS_FILE, content)


def forget_speedups() -> None:
    """Make the next lookup read the file again."""
    read_speedups.cache_clear()
    faster_cases.cache_clear()
    fastest_plan.cache_clear()
