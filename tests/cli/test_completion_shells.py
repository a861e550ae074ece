"""Completion in real shells: the script that internvl3 completion prints, evaluated by each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import internvl3_mlx

ROOT = Path(internvl3_mlx.__file__).parents[1]
BASH = """
eval "$(internvl3 completion bash)"
COMP_WORDS=(internvl3 chat --model de); COMP_CWORD=3
_internvl3_completion internvl3
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "internvl3 completion fish | source; complete -C 'internvl3 chat --model de'"
# zsh's own functions work in its line editor only, so what they would add is printed
ZSH = """
function compdef() { }; function compadd() { print -rl -- ${(P)@[-1]} $@ }
function _describe() { print -rl -- ${(P)@[-1]} $@ }
eval "$(internvl3 completion zsh)"
words=(internvl3 chat --model de); CURRENT=4
_internvl3_completion 2>/dev/null
"""


@pytest.mark.parametrize(
    ("shell", "flags", "script"),
    [
        ("bash", ["--norc", "-c"], BASH),
        ("fish", ["--no-config", "-c"], FISH),
        ("zsh", ["-f", "-c"], ZSH),
    ],
)
def test_names_of_models_and_folders_are_completed(shell, flags, script, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "bin" / "internvl3"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m internvl3_mlx "$@"\n')
    program.chmod(0o755)
    (tmp_path / "demand").mkdir()
    path = f"{program.parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, *flags, script], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60
    )
    assert {"demo", "demand"} <= {*done.stdout.split()}, done.stderr
