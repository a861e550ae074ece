"""The report lists what is correct, what falls back and what is wrong, without paths."""

import json
from dataclasses import dataclass

import mlx.core as mx
import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

import internvl3_mlx
from internvl3_mlx.cli import doctor as doctor_module
from internvl3_mlx.cli.main import main
from internvl3_mlx.generation.compiled_step import tokens_before_compiling
from internvl3_mlx.metal_kernels import dispatch, registry, self_test, variants
from internvl3_mlx.profiling import numbers, self_check, smoke_test


@pytest.fixture(autouse=True)
def _no_metal(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.MODE_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    some = {name: smoke_test.SMOKE_TEST[name] for name in ("matrix product", "gather")}
    monkeypatch.setattr(smoke_test, "SMOKE_TEST", some)
    monkeypatch.setattr(numbers, "HEAD_WIDTH", 64)
    registry.forget_speedups()
    yield
    self_test.results.clear()
    registry.forget_speedups()


def doctor(*words):
    return CliRunner().invoke(main, ["doctor", *words], prog_name="internvl3")


@dataclass(frozen=True)
class Sound:
    """A kernel that computes what it should."""

    name: str = "sound"
    dtype: mx.Dtype = mx.float32
    fallback: str = "MLX"
    fault: str = ""

    def self_test_pairs(self):
        if self.fault:
            raise RuntimeError(self.fault)
        return [(mx.ones(3), mx.ones(3))]


@pytest.fixture
def a_mac(_no_metal, monkeypatch):
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    return lambda *found: monkeypatch.setattr(variants, "all_variants", lambda: [*found])


def test_without_metal_that_is_said_and_the_rest_is_tried():
    result = doctor()
    assert result.exit_code == 0
    assert "not run: Metal is not available" in result.stdout
    assert "rotary at V2PE positions" in result.stdout
    assert "says 'dog'" in result.stdout
    assert result.stdout.endswith("verdict  all checks passed\n")


def test_the_report_is_one_json_object():
    report = json.loads(doctor("--json").stdout)
    assert report["versions"]["mlx"] == mx.__version__.split("+")[0]
    assert report["kernels"]["setting"] == "on"
    assert report["compiled decode step"] == {
        "setting": "auto",
        "used": f"once a model has decoded {tokens_before_compiling():,} tokens",
    }
    assert [check["result"] for check in report["checks"]] == [*["ok"] * 8, "skipped", "ok"]
    assert "numbers" not in report


def test_the_device_is_shown_before_anything_is_tried(monkeypatch):
    def die(**_):
        raise KeyboardInterrupt  # as a fault of the GPU ends the process

    monkeypatch.setattr(doctor_module, "run_checks", die)
    result = doctor()
    assert result.exit_code == 130
    assert "device name" in result.stdout
    assert "mlx  " in result.stdout


def test_numbers_are_measured_on_request_and_explained():
    report = json.loads(doctor("--numbers", "--json").stdout)
    assert [entry["name"] for entry in report["numbers"]] == [
        "rotary embedding", "quantization", "functions", "float32 products", "head"
    ]  # fmt: skip
    assert all(entry["as_expected"] for entry in report["numbers"])
    shown = doctor("--numbers").stdout
    assert "numbers\n  rotary embedding  V2PE's positions are rotated to" in shown


def test_kernels_that_work_and_kernels_that_do_not(a_mac):
    a_mac(Sound(), Sound("broken", fault="cannot open /Users/ada/Library/x.metallib: no"))
    result = doctor("--json")
    report = json.loads(result.stdout)
    sound, broken = report["checks"][8:10]
    assert sound == {"check": "sound", "result": "ok", "detail": "relative error 0"}
    assert broken["result"] == "falls back"
    assert broken["detail"] == "failed on this machine (cannot open …: no)"
    assert report["verdict"].startswith(
        "all results are correct, but a kernel falls back to MLX here"
    )
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_wrong_result_ends_with_an_exit_code(monkeypatch):
    monkeypatch.setitem(self_check.CHECKS, "attention, 8-bit cache", lambda: 0.5)
    result = doctor()
    assert result.exit_code == 1
    assert "attention, 8-bit cache               WRONG    relative error 5e-01" in result.stdout
    assert "1 of 10 checks failed; please report this" in result.stdout


def test_a_model_that_fails_is_a_result(monkeypatch):
    def load(_):
        raise OSError("no room in /private/var/ada")

    monkeypatch.setitem(vars(internvl3_mlx), "load", load)
    report = json.loads(doctor("--json").stdout)
    assert report["checks"][-1]["detail"] == "OSError: no room in …"
    assert report["checks"][-1]["result"] == "WRONG"


def test_measured_kernels_are_reported():
    kernels = json.loads(doctor("--json").stdout)["kernels"]
    assert kernels["measured"].startswith("nothing yet; the first long prompt of a model")
    assert kernels["macos"]
    registry.add_speedups(
        [registry.KernelSpeedup("flash", 4096, 1.314), registry.KernelSpeedup("flash", 512, 0.9)]
    )
    measured = json.loads(doctor("--json").stdout)["kernels"]["measured"]
    assert measured == {"flash": "0.90x at 512 tokens, 1.31x at 4,096 tokens"}


def test_a_crashed_self_test_is_repeated_on_request(a_mac):
    a_mac(Sound())
    crashed = {"name": "sound", "passed": False, "detail": self_test.CRASHED}
    registry.write_record(registry.SELF_TESTS_FILE, {"sound": crashed})
    check = json.loads(doctor("--json").stdout)["checks"][8]
    assert (check["result"], check["detail"]) == ("falls back", self_test.CRASHED)
    assert "internvl3 doctor --retry" in check["detail"]
    self_test.results.clear()
    assert json.loads(doctor("--json", "--retry").stdout)["checks"][8]["result"] == "ok"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at ~/models/x and /a/b/c.py:3", "at … and …:3"),
        ("3/4 of 1/16", "3/4 of 1/16"),
        ("error 1e-05, GB/s", "error 1e-05, GB/s"),
    ],
)
def test_paths_are_left_out_and_nothing_else(text, shown):
    assert doctor_module.check_row("a", "ok", text)["detail"] == shown


def ask(monkeypatch, tmp_path, switch, *words):
    random_image(60, 60).save(tmp_path / "a.png")
    monkeypatch.setenv(dispatch.MODE_VARIABLE, switch)
    model = str(tiny(Recipe()).folder)
    words = [*words, "-p", "?", "--model", model, "-m", "3", "--kv-bits", "8"]
    return CliRunner().invoke(main, ["generate", str(tmp_path / "a.png"), *words])


def test_a_kernel_that_does_not_work_is_reported_in_one_line(monkeypatch, tmp_path, a_mac):
    from internvl3_mlx.metal_kernels.flash_decode import FlashVariant

    plain = ask(monkeypatch, tmp_path, "off")
    monkeypatch.setattr(
        FlashVariant, "self_test_pairs", Sound(fault="no such function").self_test_pairs
    )
    result = ask(monkeypatch, tmp_path, "force")
    assert result.stdout == plain.stdout
    assert result.stderr.startswith("note: Metal kernel flash_decode 8 bits")
    assert "(no such function); falling back to MLX's own attention" in result.stderr
    notes = [line for line in result.stderr.splitlines() if "flash_decode" in line]
    assert len(notes) == 1
    self_test.results.clear()
    (tmp_path / "kernels" / "self_tests.json").unlink()
    assert "Metal" not in ask(monkeypatch, tmp_path, "force", "--quiet").stderr


def test_an_unknown_mode_is_rejected_before_anything_is_tried(monkeypatch):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "maybe")
    monkeypatch.setattr(doctor_module, "run_checks", None)
    result = doctor()
    assert result.exit_code == 2
    assert "INTERNVL3_KERNELS=maybe is not a mode; choose from off, on, force" in result.stderr


def test_an_unknown_mode_is_rejected_before_a_model_loads(monkeypatch, tmp_path):
    monkeypatch.setitem(vars(internvl3_mlx), "load", None)
    result = ask(monkeypatch, tmp_path, "maybe")
    assert result.exit_code == 2
    assert "INTERNVL3_KERNELS=maybe is not a mode; choose from off, on, force" in result.stderr
