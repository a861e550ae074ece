"""First uses at the same time all answer; a command killed anywhere leaves the old or the new."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.files import content_digest
from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.write_guards import hold_lock

ROOT = DEMO_FOLDER.parents[1]
PROGRAM = [sys.executable, "-m", "internvl3_mlx"]
KILLS = 3  # of the whole command; test_kills.py has many of its steps


@pytest.fixture
def environment(tmp_path):
    """Make a hub cache in which the demo model poses as the 1b size."""
    repo = tmp_path / "hf" / "hub" / "models--OpenGVLab--InternVL3-1B"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for path in DEMO_FOLDER.iterdir():
        if path.suffix in (".json", ".safetensors", ".md"):
            shutil.copy(path, snapshot)
    return {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "INTERNVL3_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }


def start(*words: str, env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *words],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_three_first_uses_at_once_all_answer(environment, tmp_path):
    words = ["generate", "-p", "hi", "-m", "2", "--model", "1b"]
    lock = tmp_path / "cache" / ".InternVL3-1B-4bit.lock"
    with hold_lock(lock, on_wait=lambda: None):
        running = [start(*words, env=environment, cwd=tmp_path) for _ in range(3)]
        for process in running:
            while "another process prepares InternVL3-1B-4bit; waiting" not in (
                line := process.stderr.readline()
            ):
                assert line, process.wait()
    outcomes = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in outcomes] == [0, 0, 0], outcomes
    assert sum("quantizing" in said for said, _ in outcomes) == 1
    assert {*os.listdir(tmp_path / "cache")} - {"CACHEDIR.TAG"} == {"InternVL3-1B-4bit"}
    open_checkpoint(tmp_path / "cache" / "InternVL3-1B-4bit")


@pytest.mark.slow
def test_a_half_copy_in_the_cache_is_made_anew(environment, tmp_path):
    half = tmp_path / "cache" / "InternVL3-1B-4bit"
    half.mkdir(parents=True)
    shutil.copy(DEMO_FOLDER / "config.json", half)
    (half / "model.safetensors").write_bytes(b"")
    process = start("generate", "-p", "hi", "--model", "1b", env=environment, cwd=tmp_path)
    process.communicate()
    assert process.returncode == 0
    open_checkpoint(half)


@pytest.mark.slow
def test_a_conversion_killed_anywhere_loses_nothing(environment, tmp_path):
    before = {path.name: content_digest(path) for path in DEMO_FOLDER.glob("*.*")}
    words = ["convert", "demo", "-q", "-o", "out", "--overwrite", "--no-verify"]
    began = time.monotonic()
    assert start(*words, env=environment, cwd=tmp_path).wait() == 0
    whole_s = time.monotonic() - began
    first = {path.name for path in (tmp_path / "out").iterdir()}
    chance = random.Random(3)
    for _ in range(KILLS):
        process = start(*words, env=environment, cwd=tmp_path)
        time.sleep(whole_s * chance.uniform(0.4, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        target = tmp_path / "out"
        if not target.exists():  # between the two renames: the next run puts it back
            assert len(list(tmp_path.glob(".out.*.old"))) == 1
            continue
        assert {path.name for path in target.iterdir()} == first
        open_checkpoint(target)
        assert "internvl3 convert demo" in (target / "README.md").read_text("utf-8")
    assert start(*words, env=environment, cwd=tmp_path).wait() == 0
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]
    assert {path.name: content_digest(path) for path in DEMO_FOLDER.glob("*.*")} == before
