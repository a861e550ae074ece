"""Two trainers are timed on the same samples; the benchmark stops when their losses differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sides import OURS, PEER
from benchmarks.training import check_same

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_training_time_and_memory_are_measured(tmp_path):
    out = tmp_path / "out.json"
    words = ["--runs", "1", "--quick", "--only", "sft", "--work", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.training", *words, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours = json.loads(out.read_text())["figures"]["sft"][OURS]
    assert ours["later_cpu"] > 0
    assert ours["peak_mb"] > 1
    assert ours["tokens"] > 256 + 16 + 220  # a tile, a question, an answer, and their frame
    assert "| **SFT, frozen tower** |" in done.stdout


def test_losses_that_differ_stop_the_benchmark():
    check_same({OURS: {"loss": 5.0}, PEER: {"loss": 5.001}})
    with pytest.raises(SystemExit, match=r"the losses differ: 5.1 here, 5.0 in mlx-vlm"):
        check_same({OURS: {"loss": 5.1}, PEER: {"loss": 5.0}})
