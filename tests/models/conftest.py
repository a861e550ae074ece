"""A GPU that is not there, whose kernels are all trusted."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.self_test import SelfTestResult


@pytest.fixture
def a_trusted_mac(monkeypatch, tmp_path):
    """Let kernels find a GPU on which every self-test passes, and nothing remembered."""
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    monkeypatch.setattr(dispatch, "architecture", lambda: "applegpu_g99s")
    monkeypatch.setattr(
        self_test, "run_self_test", lambda variant: SelfTestResult(variant.name, True, "")
    )
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.MODE_VARIABLE, raising=False)
    self_test.results.clear()
    registry.forget_speedups()
    yield
    self_test.results.clear()
    registry.forget_speedups()
