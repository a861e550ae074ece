"""Damaged media, conversations and models: read, or refused in one line; no crash, hang or bomb."""

import json
import os
import subprocess
import sys

import pytest
from fixtures import fuzz_program

# one image may have 178 megapixels, as Pillow allows: this much, decoded and as RGB
MAX_GROWTH = 1_500_000_000  # bytes
COUNTS = {
    "images": 600, "documents": 150, "videos": 1600, "conversations": 120, "histories": 120,
    "models": 120,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind):
    paths = f"{fuzz_program.ROOT}{os.pathsep}{fuzz_program.ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, fuzz_program.__file__, kind, str(COUNTS[kind])],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["faults"] == []
    assert report["refused"] > COUNTS[kind] // 20
    assert report["read"] > COUNTS[kind] // 20
    assert report["grown"] < MAX_GROWTH
