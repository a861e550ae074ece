"""The benchmark of the server starts one, asks it, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import Reply, read_line

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_server_is_measured(tmp_path):
    pytest.importorskip("uvicorn")
    out = tmp_path / "out.json"
    words = ["--runs", "1", "--shape", "tiny", "--clients", "2", "--tokens", "3"]
    words += ["--work", str(tmp_path), "--json", str(out)]
    command = [sys.executable, "-m", "benchmarks.serving", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(out.read_text())["sides"]["internvl3-mlx"]
    assert figures["photos, at once: tokens/s"] > 0
    assert figures["photo of 13 tiles: first token"] > 0
    assert "internvl3-mlx, photos: at once" in done.stdout


def test_a_stream_is_read_line_by_line():
    reply = Reply()
    for line in (
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n',
        b"\n",
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n',
        b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n',
        b"data: [DONE]\n",
    ):
        read_line(line, reply, 0.0)
    assert reply.tokens == 7
    assert reply.first_s > 0
