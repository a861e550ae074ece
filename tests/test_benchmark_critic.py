"""A critic's scores are the same in every way that the benchmark times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_way_gives_the_same_scores_and_is_measured(tmp_path):
    out = tmp_path / "out.json"
    words = ["--runs", "1", "--shape", "tiny", "-n", "2", "--steps", "2", "--work", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.critic", *words, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ways = json.loads(out.read_text())["ways"]
    assert len(ways) == 3
    assert all(figure > 0 for way in ways.values() for figure in way.values())
    assert "| one forward pass for each step |" in done.stdout
