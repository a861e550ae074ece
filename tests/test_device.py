"""The device that computes: asked for the GPU, and never left with memory of our own."""

import ast
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures.pretend_gpu import GB, pretend_metal

import internvl3_mlx
from internvl3_mlx.cli.system_info import device_info
from internvl3_mlx.device import TF32_VARIABLE, on_gpu, use_full_float32
from internvl3_mlx.metal_kernels import dispatch

PACKAGE = Path(internvl3_mlx.__file__).parent


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.uint16])
def test_an_array_keeps_its_numbers_when_numpys_memory_is_used_again(dtype):
    source = np.arange(70_000, dtype=dtype)
    copied = mx.array(source)
    doubled = copied + copied
    expected = source * 2
    source[:] = 1
    assert np.array_equal(np.array(doubled), expected)


def test_the_gpu_describes_itself_whatever_the_default_device_is(monkeypatch):
    pretend_metal(monkeypatch, 12 * GB)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert device_info()["device_name"] == "a GPU"
    assert device_info()["usable_by_gpu_nbytes"] == 12 * GB
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    assert dispatch.device_name() == "a GPU"


def test_the_device_is_never_asked_while_a_module_is_imported():
    asked = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        asked += [
            path.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in DEVICE_QUESTIONS
            and id(node) not in inside
        ]
    assert asked == []


DEVICE_QUESTIONS = {"on_gpu", "on_cpu", "default_device", "device_info", "is_available", "gpu_info"}


def test_full_float32_leaves_a_users_choice(monkeypatch):
    monkeypatch.setenv(TF32_VARIABLE, "1")
    use_full_float32()
    assert os.environ[TF32_VARIABLE] == "1"
    monkeypatch.delenv(TF32_VARIABLE)
    use_full_float32()
    assert os.environ[TF32_VARIABLE] == "0"


def test_on_gpu_follows_the_default_device(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert on_gpu()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not on_gpu()
