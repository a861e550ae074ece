"""One report to paste into an issue: complete, Markdown, and nothing private in it."""

import getpass
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

import internvl3_mlx
from internvl3_mlx.cli import bench, doctor_report
from internvl3_mlx.cli.main import main
from internvl3_mlx.metal_kernels import dispatch, registry
from internvl3_mlx.profiling import kernels, limits, numbers, smoke_test, suite, timing
from internvl3_mlx.profiling.kernels import AttentionTrial
from internvl3_mlx.profiling.limits import MachineLimits

LIMITS = MachineLimits(bandwidth=2.5e9, rate=3e10, launch_s=5e-6, dtype="float32")
PARTS = ["Machine", "Kernels", "Checks", "Numbers", "Speed: verdict", "Speed: limits"]


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    some = {name: smoke_test.SMOKE_TEST[name] for name in ("matrix product", "gather")}
    monkeypatch.setattr(smoke_test, "SMOKE_TEST", some)
    monkeypatch.setattr(numbers, "HEAD_WIDTH", 64)
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(limits, "measure_limits", lambda *, quick: LIMITS)
    trials = [AttentionTrial("odd", 6, 2, 64, 8)]
    monkeypatch.setattr(kernels, "attention_trials", lambda *, quick: trials)
    for name in ("QUICK_CPU_CONTEXTS", "QUICK_CONTEXTS"):
        monkeypatch.setattr(suite, name, (7,))
    registry.forget_speedups()
    doctor_report.private_names.cache_clear()
    yield
    registry.forget_speedups()
    doctor_report.private_names.cache_clear()


def doctor(*words):
    return CliRunner().invoke(main, ["doctor", *words], prog_name="internvl3")


def titles(text):
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_one_command_writes_everything_as_markdown(tmp_path):
    result = doctor("--report", str(tmp_path / "report.md"))
    assert result.exit_code == 0
    assert result.stdout == f"all checks passed; the report is in {tmp_path / 'report.md'}\n"
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith("# internvl3-mlx on ")
    assert titles(text)[: len(PARTS)] == PARTS
    assert {"Speed: tower", "Speed: decode", "Speed: kernels"} <= {*titles(text)}
    assert "| matrix product | ok | relative error float32" in text
    assert "| quantization | yes | mx.quantize gives a CPU's numbers" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            cells = {line.replace("\\|", "").count("|") for line in table.splitlines()}
            assert len(cells) == 1, table


def test_without_a_file_it_is_printed():
    text = doctor("--report").stdout
    assert text.startswith("# internvl3-mlx on ")
    assert titles(text)[: len(PARTS)] == PARTS


def test_nothing_private_is_in_it(monkeypatch, tmp_path):
    def load(_):
        raise OSError("ada cannot read /Users/ada/models/x on adas-mac.local (adas-mac, ~/y/z)")

    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "adas-mac.local")
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/ada"))
    monkeypatch.setitem(vars(internvl3_mlx), "load", load)
    result = doctor("--report", str(tmp_path / "report.md"))
    assert result.exit_code == 1  # the demo model did not answer
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "OSError: … cannot read … on … (…, …)" in text
    for private in ("ada", "/Users", "adas-mac", str(tmp_path)):
        assert private not in text


def test_what_was_measured_survives_a_fault_of_the_rest(monkeypatch, tmp_path):
    def fault(*_, **__):
        raise RuntimeError("[METAL] Insufficient Memory")

    path = tmp_path / "report.md"
    monkeypatch.setattr(bench, "run_bench", fault)
    assert doctor("--report", str(path)).exit_code == 0
    assert titles(path.read_text("utf-8"))[3:] == ["Numbers", "Speed: not measured"]

    def end_the_process(**_):
        raise KeyboardInterrupt

    path.unlink()
    monkeypatch.setattr(doctor_report, "measure", end_the_process)
    assert doctor("--report", str(path)).exit_code == 130
    assert titles(path.read_text("utf-8")) == ["Machine", "Kernels", "Checks"]


def test_only_a_report_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("my notes")
    monkeypatch.setattr(doctor_report, "complete", None)
    result = doctor("--report", str(tmp_path / "notes.md"))
    assert result.exit_code in (1, 2)
    assert "exists and is not a report of ours; name another file" in result.stderr
    missing = doctor("--report", str(tmp_path / "nowhere" / "r.md"))
    assert (missing.exit_code, "no folder" in missing.stderr) == (2, True)
    both = doctor("--report", "--json")
    assert (both.exit_code, "choose one" in both.stderr) == (2, True)
