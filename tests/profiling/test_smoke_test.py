"""The smoke test covers what we use, passes here, and notices each operation going wrong."""

import ast
from pathlib import Path
from typing import get_args

import mlx.core as mx
import pytest
from fixtures.fused_sizes import FUSED_DIMS, recorded_attention

import internvl3_mlx
from internvl3_mlx.conversion import Mode
from internvl3_mlx.profiling import smoke_test
from internvl3_mlx.profiling.smoke_test import (
    AFFINE_BITS,
    SMOKE_TEST,
    Operation,
    Outcome,
    judge,
    normal,
    run_smoke_test,
)

PACKAGE = Path(internvl3_mlx.__file__).parent


@pytest.fixture(scope="module")
def results():
    return list(run_smoke_test())


def test_every_operation_is_right_here(results):
    assert [(r.name, r.outcome) for r in results] == [(name, Outcome.OK) for name in SMOKE_TEST]


def test_every_quantization_mode_and_width_is_among_them():
    modes = {name.split(", ")[1] for name in SMOKE_TEST if name.startswith("quantized product")}
    assert modes == {*get_args(Mode)}
    for bits in AFFINE_BITS:
        assert f"quantized product, affine, {bits} bits" in SMOKE_TEST


def fast_operations():
    """Return the names of ``mx.fast`` that the package calls."""
    return {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "fast"
    }


def test_every_fused_operation_is_among_them(monkeypatch):
    called = set()

    def record(name):
        function = getattr(mx.fast, name)

        def recorded(*arguments, **options):
            called.add(name)
            return function(*arguments, **options)

        return recorded

    wanted = fast_operations() - {"metal_kernel"} | {"rms_norm", "layer_norm"}  # of nn's layers
    for name in wanted:
        monkeypatch.setattr(mx.fast, name, record(name))
    names = ("causal attention", "fused rotary", "RMS norm", "layer norm")
    assert all(judge(name, SMOKE_TEST[name]).outcome == Outcome.OK for name in names)
    assert called == wanted


def test_attention_is_tried_with_the_published_head_sizes_and_all_masks(monkeypatch):
    # a CPU writes the attention of one masked row out
    monkeypatch.setattr("internvl3_mlx.models.attention.on_gpu", lambda: True)
    with recorded_attention() as calls:
        for name in SMOKE_TEST:
            if "attention" in name:
                judge(name, SMOKE_TEST[name])
    assert {call.dtype for call in calls} == {mx.float32, mx.float16, mx.bfloat16}
    for dim in FUSED_DIMS:
        found = {(call.few_rows, call.mask) for call in calls if call.dim == dim}
        assert found == {
            (False, "none"), (False, "causal"), (True, "causal"), (True, "none"), (True, "array")
        }  # fmt: skip


def wrong(function):
    return lambda *arguments, **options: function(*arguments, **options) * 1.2


@pytest.mark.parametrize(
    ("module", "name", "noticed"),
    [
        (mx.fast, "rms_norm", {"RMS norm"}),
        (mx.fast, "layer_norm", {"layer norm"}),
        (mx.fast, "rope", {"fused rotary"}),
        (mx, "softmax", {"softmax"}),
        (mx, "addmm", {"product and sum"}),
    ],
)
def test_an_operation_that_is_wrong_is_named(monkeypatch, module, name, noticed):
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    some = ("RMS norm", "layer norm", "fused rotary", "softmax", "product and sum", "gather")
    found = {n for n in some if judge(n, SMOKE_TEST[n]).outcome == Outcome.WRONG}
    assert found == noticed


def off_by(factor):
    return [Operation(lambda x: x * factor, lambda x: x, lambda: [normal(5, 7)])]


def test_products_with_fewer_bits_are_no_error_and_other_operations_are():
    assert judge("matrix product", off_by(1 + 1e-3)).outcome == Outcome.REDUCED
    assert judge("softmax", off_by(1 + 1e-3)).outcome == Outcome.WRONG
    assert judge("matrix product", off_by(1 + 1e-2)).outcome == Outcome.WRONG
    assert judge("matrix product", off_by(float("nan"))).outcome == Outcome.WRONG


def test_an_operation_that_is_missing_is_a_result():
    def missing(x):
        raise RuntimeError("no kernel")

    found = judge("gather", [Operation(missing, lambda x: x, lambda: [normal(2)])])
    assert (found.outcome, found.detail) == (Outcome.WRONG, "float32: RuntimeError: no kernel")


def test_a_shape_that_differs_is_wrong():
    assert smoke_test.relative_error(mx.zeros((2, 1)), mx.zeros((1, 2))) == float("inf")
