"""The operation checks pass, and each detects its own operation going wrong."""

import mlx.core as mx
import pytest

from internvl3_mlx.profiling import self_check
from internvl3_mlx.profiling.self_check import CHECKS, run_operation_checks


def test_all_checks_pass():
    assert [(check.name, check.passed) for check in run_operation_checks()] == [
        (name, True) for name in CHECKS
    ]


def wrong(function):
    """Return what ``function`` does, every number a little off."""

    def spoiled(*args, **kwargs):
        found = function(*args, **kwargs)
        return tuple(x * 1.01 for x in found) if isinstance(found, tuple) else found * 1.01

    return spoiled


@pytest.mark.parametrize(
    ("name", "noticed"),
    [
        ("flash_decode_reference", {"attention, 16-bit cache", "attention, 8-bit cache",
         "attention, 4-bit cache", "attention in two segments"}),
        ("merge_attention", {"attention in two segments"}),
    ],
)  # fmt: skip
def test_a_wrong_operation_is_detected(monkeypatch, name, noticed):
    monkeypatch.setattr(self_check, name, wrong(getattr(self_check, name)))
    assert {check.name for check in run_operation_checks() if not check.passed} == noticed


def test_rotary_at_rounded_positions_is_detected(monkeypatch):
    rotary = self_check.Rotary
    monkeypatch.setattr(self_check, "Rotary", lambda d, b, at: rotary(d, b, mx.round(at)))
    from_base = self_check.RopeParams.from_base
    monkeypatch.setattr(
        self_check.RopeParams, "from_base", lambda at, d, b: from_base(mx.round(at), d, b)
    )
    failed = {check.name for check in run_operation_checks() if not check.passed}
    assert failed == {"rotary at V2PE positions", "new keys rotated and quantized"}


def test_an_exception_is_a_result(monkeypatch):
    monkeypatch.setitem(CHECKS, "attention in two segments", lambda: 1 / 0)
    (failed,) = [check for check in run_operation_checks() if not check.passed]
    assert (failed.name, failed.detail) == (
        "attention in two segments",
        "ZeroDivisionError: division by zero",
    )
