"""Let MLX say that it computes on a Mac's GPU, while its CPU back end computes.

Python imports this file at its start when this folder is on PYTHONPATH, so that child processes
pretend, too:

    PYTHONPATH=tests/pretend_gpu PRETEND_GPU=1 python -m pytest
    PYTHONPATH=tests/pretend_gpu PRETEND_GPU=noisy python -m pytest

``1`` takes every branch that our Python has for GPUs: compiled functions, the checkpoint's own
dtype, other chunks, wired memory. ``noisy`` also computes as another back end might: with the fast
trigonometry of MLX's rotary kernel, and with last digits that depend on the number of rows.
"""

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODE = os.environ.get("PRETEND_GPU", "")
GIB = 2**30
MAC = {
    "device_name": "Apple M1, pretended",
    "architecture": "applegpu_g13g",
    "memory_size": 18 * GIB,
    "max_recommended_working_set_size": 12 * GIB,
    "max_buffer_length": 9 * GIB,
    "resource_limit": 499_000,
}


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds a module where it is, and has it patched once it is loaded."""

    def __init__(self, patches: dict[str, Any]):
        self.patches = patches

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        patch = self.patches.pop(name, None)
        spec = importlib.util.find_spec(name) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        spec.loader = PatchingLoader(spec.loader, patch)
        return spec


class PatchingLoader(importlib.abc.Loader):
    def __init__(self, inner: Any, patch: Any):
        self.inner, self.patch = inner, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.patch(module)


def pretend_mac(mx: Any) -> None:
    """Answer as MLX does on a Mac; our own kernels see no Metal, since none could run."""
    device_info, gpu = mx.device_info, mx.Device(mx.gpu)

    def describe(device: Any = gpu) -> dict[str, Any]:
        return dict(MAC) if device in (mx.gpu, gpu) else device_info(device)

    def is_available() -> bool:
        return "metal_kernels" not in sys._getframe(1).f_globals.get("__name__", "")

    mx.default_device = lambda: gpu
    mx.device_info = describe
    mx.metal.is_available = is_available
    mx.set_wired_limit = WiredLimit().set


class WiredLimit:
    def __init__(self) -> None:
        self.limit = 0

    def set(self, limit: int) -> int:
        if limit > MAC["max_recommended_working_set_size"]:
            raise ValueError("[metal::set_wired_limit] the limit is larger than recommended")
        before, self.limit = self.limit, limit
        return before


def compute_noisily(nn: ModuleType) -> None:
    import noise

    noise.install(nn)


def pretend_in_other_folders() -> None:
    """Name this folder in full, since a child process may start in another one."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in places)


if MODE:
    pretend_in_other_folders()
    todo = {"mlx.core": pretend_mac}
    if MODE == "noisy":
        todo["mlx.nn"] = compute_noisily
    sys.meta_path.insert(0, PatchingFinder(todo))
