"""The second turn of a conversation is timed, and is many times faster than starting again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_second_turn_is_timed_beside_reading_everything_again(tmp_path):
    out = tmp_path / "out.json"
    words = ["--runs", "1", "--shape", "tiny", "--photo", "7 tiles", "--work", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.chat", *words, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = json.loads(out.read_text())["seconds"]
    conversation, again = list(seconds.values())[:2]
    assert again > 10 * conversation
    assert "| internvl3-mlx, conversation |" in done.stdout
