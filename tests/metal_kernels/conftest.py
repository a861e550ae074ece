"""A machine that seems to have Metal."""

from collections.abc import Callable

import pytest
from metal_emulator import emulated_metal

from internvl3_mlx.metal_kernels import dispatch, registry, self_test


@pytest.fixture
def emulated() -> Callable:
    """Give ``emulated_metal``, inside which kernels are built again."""

    def fresh(*args, **kwargs):
        dispatch.build_kernel.cache_clear()
        return emulated_metal(*args, **kwargs)

    yield fresh
    dispatch.build_kernel.cache_clear()


@pytest.fixture
def a_mac(monkeypatch, tmp_path):
    """Let kernels find a GPU, an empty cache folder and nothing remembered."""
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    monkeypatch.setattr(dispatch, "device_name", lambda: "Apple M9")
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.MODE_VARIABLE, raising=False)
    self_test.results.clear()
    registry.forget_speedups()
    yield tmp_path / "kernels"
    self_test.results.clear()
    registry.forget_speedups()
