import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import internvl3_mlx
from internvl3_mlx.cli import generate as generate_module
from internvl3_mlx.cli.main import COMMANDS, OTHER_PROGRAMS, main
from internvl3_mlx.errors import CheckpointError, DownloadError

ROOT = Path(__file__).parents[2]
HEAVY = {"mlx", "mlx_lm", "numpy", "PIL", "rich", "tokenizers", "huggingface_hub", "transformers"}
HELP_SECONDS = 0.5  # of processor time: the promise is about work, and test machines are shared


def invoke(*args: str, **kwargs):
    return CliRunner().invoke(main, [*args], prog_name="internvl3", **kwargs)


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["generate", "--help"], ["info", "-h"], ["train", "-h"]]
)
def test_help_imports_nothing_heavy_and_takes_under_half_a_second(words, tmp_path, monkeypatch):
    """With compiled files, as an installed program has them."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = f"""
import contextlib, io, sys, time
from internvl3_mlx.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as shown:
    exit_code = main({words!r}, standalone_mode=False)
seconds = time.process_time()
import json
print(json.dumps([exit_code, "Usage" in shown.getvalue(), seconds, sorted(sys.modules)]))
"""
    runs = [json.loads(python(code).stdout) for _ in range(3)]  # the least disturbed one counts
    exit_code, is_help, _, modules = runs[0]
    assert (exit_code or 0, is_help) == (0, True)
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert min(seconds for _, _, seconds, _ in runs) < HELP_SECONDS


def test_every_command_is_listed_with_its_first_sentence():
    screen = invoke().stdout
    assert screen == invoke("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name}" in screen
    assert "Answer one question about images or videos.\n" in screen


def test_version_is_one_line():
    result = invoke("--version")
    assert result.stdout == f"internvl3-mlx {internvl3_mlx.__version__}\n"
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("genrate", "did you mean generate?"),
        ("xyz", f"choose from {', '.join(COMMANDS)}"),
        ("lora", "internvl3 train fine-tunes"),
        ("pull", "internvl3 models pull downloads a model"),
        ("help", "internvl3 --help lists the commands, internvl3 COMMAND --help explains one"),
    ],
)
def test_unknown_command_gets_the_nearest_name(typed, advice):
    result = invoke(typed)
    assert result.stderr == f"error: unknown command {typed!r}; {advice}\nsee internvl3 --help\n"
    assert (result.stdout, result.exit_code) == ("", 2)


def test_every_hint_names_a_command_that_exists():
    for hint in OTHER_PROGRAMS.values():
        words = [word for word in re.findall(r"internvl3 ([a-z]+)", hint)]
        assert {*words} <= {*COMMANDS}, hint


def test_a_flag_of_the_group_is_one_line_too():
    result = invoke("--hlep")
    assert result.exit_code == 2
    # the words between are click's, and differ from release to release
    assert re.fullmatch("error: .*--hlep.*--help.*\nsee internvl3 --help\n", result.stderr)


def test_unknown_flag_is_one_line_and_where_to_look():
    result = invoke("generate", "--max-tokenz", "3")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: No such option")
    assert "--max-tokens" in first
    assert second == "see internvl3 generate --help"
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("fault", "line", "exit_code"),
    [
        (CheckpointError("no config.json in m"), "error: no config.json in m\n", 2),
        (DownloadError("no network"), "error: no network\n", 1),
        (
            ZeroDivisionError("by 0"),
            "error: ZeroDivisionError: by 0 (run again with --debug for the traceback)\n",
            1,
        ),
        (
            KeyError(),
            "error: KeyError (run again with --debug for the traceback)\n",
            1,
        ),
        (click.Abort(), "", 130),
        (KeyboardInterrupt(), "", 130),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(fault, line, exit_code, monkeypatch):
    def fail(*_args):
        raise fault

    monkeypatch.setattr(generate_module, "_check_output", fail)
    result = invoke("generate", "-p", "why?")
    assert (result.stdout, result.stderr, result.exit_code) == ("", line, exit_code)


def test_debug_shows_the_traceback_above_the_line(monkeypatch):
    def fail(*_args):
        raise DownloadError("no network")

    monkeypatch.setattr(generate_module, "_check_output", fail)
    result = invoke("generate", "-p", "why?", "--debug")
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith("\nerror: no network\n")
    assert result.exit_code == 1


def test_debug_covers_mistakes_in_later_flags():
    result = invoke("generate", "--top-p", "high", "--debug")
    assert "Traceback" in result.stderr
    assert result.exit_code == 2


def test_a_closed_pipe_ends_the_program_quietly():
    code = """
import internvl3_mlx
from fixtures.fake_vlm import FakeVLM
internvl3_mlx.load = FakeVLM(pieces=("word " * 2000,) * 50).load
import sys
sys.argv = ["internvl3", "generate", "-p", "why?"]
from internvl3_mlx.cli.main import run
run()
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(4) == b"word"
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("call", [["-m", "internvl3_mlx"], ["-m", "internvl3_mlx", "--version"]])
def test_the_package_runs_as_a_module(call):
    done = subprocess.run([sys.executable, *call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout


def test_a_full_disk_is_reported_without_its_number(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("internvl3_mlx.cli.console.print_table", full)
    result = invoke("info")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: cannot write the output: no space left on the disk; free some and run again\n"
    )
