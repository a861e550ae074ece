"""``internvl3 bench``: a table, JSON or a image of what was measured, however it ends."""

import errno
import json
import re
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli.main import main
from internvl3_mlx.metal_kernels import dispatch, registry
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.profiling import kernels, limits, timing
from internvl3_mlx.profiling.kernels import METAL_MISSING, AttentionTrial
from internvl3_mlx.profiling.limits import MachineLimits
from internvl3_mlx.profiling.suite import BenchmarkSuite

LIMITS = MachineLimits(bandwidth=2.5e9, rate=3e10, launch_s=5e-6, dtype="float32")


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """Measure each thing once, one kernel alone, on a machine of known limits without Metal."""
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(limits, "measure_limits", lambda *, quick: LIMITS)
    monkeypatch.setattr(
        kernels, "attention_trials", lambda *, quick: [AttentionTrial("odd", 6, 2, 64, 8)]
    )
    registry.forget_speedups()
    yield
    registry.forget_speedups()


def bench(*words):
    model = str(tiny(Recipe(head_dim=64)).folder)
    command = ["bench", "--quick", "--contexts", "7,1k", "--model", model, *words]
    return CliRunner().invoke(main, command, prog_name="internvl3")


def test_a_table_for_every_stage():
    result = bench()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "  memory            2.5 GB/s" in lines
    assert "  float32 products  30.0 GFLOP/s" in lines
    assert [line for line in lines if line in ("tower", "prefill", "decode", "kernels")] == [
        "tower",
        "prefill",
        "decode",
        "kernels",
    ]
    assert f"not measured  {METAL_MISSING}" in lines
    # a share of over 100%, on a fast machine, is followed by a remark
    shares = [line for line in lines if re.search(r"\d%( \([^)]*\))?$", line)]
    # a tile, two contexts, three caches at both, and one with more room
    assert len(shares) == 1 + 2 + 3 * 2 + 1


def test_json_holds_every_figure_and_its_limit():
    content = json.loads(bench("--json").stdout)
    assert content["limits"] == LIMITS.to_dict()
    assert {figure["context"] for figure in content["measurements"]} == {0, 7, 1024}
    assert content["kernel_speedups"] == []
    decode = next(figure for figure in content["measurements"] if figure["group"] == "decode")
    assert decode["share"] == pytest.approx(decode["limit_s"] / decode["seconds"])


def test_an_image_is_written_whole(tmp_path):
    path = tmp_path / "roof.svg"
    assert bench("--svg", str(path)).exit_code == 0
    assert ET.fromstring(path.read_text("utf-8")).tag.endswith("svg")
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == ["roof.svg"]


def test_a_missing_folder_is_reported_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(BenchmarkSuite, "run", None)
    result = bench("--svg", str(tmp_path / "nowhere" / "roof.svg"))
    assert result.exit_code == 2
    assert "no folder" in result.stderr


@pytest.mark.parametrize("words", ["one", "1k,,2k", "0", "-3", "1.5k", "9999k"])
def test_contexts_that_are_no_numbers_of_tokens_are_rejected(words):
    result = CliRunner().invoke(main, ["bench", "--contexts", words])
    assert result.exit_code == 2
    assert f"--contexts {words}: give token counts separated by commas, such as 1k,4k,16k" in (
        result.stderr
    )


def test_an_interrupt_shows_what_was_measured(monkeypatch):
    measured = kernels.measure_attention

    def broken(trial, context, runs):
        if context > 7:
            raise KeyboardInterrupt
        return measured(trial, context, runs)

    monkeypatch.setattr(kernels, "measure_attention", broken)
    result = bench("--json")
    assert result.exit_code == 130
    assert [figure["context"] for figure in json.loads(result.stdout)["measurements"]] == [7]


@pytest.fixture
def found(monkeypatch):
    """Let a kernel be faster from 1,024 tokens on, and another one nowhere."""
    speedups = [KernelSpeedup("fast", 7, 0.8), KernelSpeedup("fast", 1024, 1.3)]
    monkeypatch.setattr(BenchmarkSuite, "speedups", [*speedups, KernelSpeedup("slow", 7, 0.4)])


def test_where_kernels_are_faster_is_saved_and_reported(found):
    shown = bench().stdout
    assert re.search(r"fast +from 1,024 tokens on\n", shown)
    assert "slow" not in shown
    assert registry.is_faster("fast", 1024)
    assert not registry.is_faster("fast", 1023)
    assert not registry.is_faster("slow", 5000)


def test_a_cache_folder_that_is_not_writable_is_reported(found, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "file"))
    result = bench()
    assert result.exit_code == 0
    assert "note: the kernel selection was not saved" in result.stderr


def test_a_plot_that_cannot_be_written_costs_no_measurements(tmp_path, monkeypatch):
    (tmp_path / "roof.svg").mkdir()
    assert bench("--svg", str(tmp_path / "roof.svg")).exit_code == 2
    monkeypatch.setattr("internvl3_mlx.files.os.replace", refuse)
    result = bench("--json", "--svg", str(tmp_path / "other.svg"))
    assert result.exit_code == 2
    assert f"cannot write {tmp_path / 'other.svg'}: No space left on device" in result.stderr
    assert len(json.loads(result.stdout)["measurements"]) == 12
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
