"""The benchmarks run on the smallest checkpoint and report their results. No time is judged."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite import GROUPS

ROOT = Path(__file__).parents[1]
ROW = {"group", "name", "unit", "ours", "peer", "ratio"}


def test_every_group_that_the_readme_names_is_there_and_no_other():
    readme = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    table = readme[readme.index("## Groups") : readme.index("## Files")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*GROUPS]


@pytest.mark.slow
def test_harness_measures_what_is_installed_and_reports_it(tmp_path):
    out = tmp_path / "out.json"
    words = ["--runs", "1", "--quick", "--shape", "tiny", "--only", "same", "memory"]
    command = [sys.executable, "-m", "benchmarks", *words, "--work", str(tmp_path), "--markdown"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    content = json.loads(out.read_text())
    assert content["runs"] == 1
    assert content["machine"]["mlx"]
    assert all(row.keys() == ROW for row in content["rows"])
    assert {row["group"] for row in content["rows"]} == {"Memory"}
    assert all(row["ours"] > 0 for row in content["rows"])
    assert "| internvl3-mlx | mlx-vlm | ratio |" in done.stdout
