"""Two processes that write one target: the second waits, and both end well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

import internvl3_mlx
from internvl3_mlx import convert_model
from internvl3_mlx.cli.convert_run import conversion_progress
from internvl3_mlx.errors import WriteError

FIRST = """
import sys
from internvl3_mlx import convert_model

def wait_at_first_tensor(event):
    if event.stage == "write":
        print("writing", flush=True)
        sys.stdin.read()

convert_model(*sys.argv[1:3], verify=False, command="a", on_progress=wait_at_first_tensor)
"""


@pytest.fixture
def first(tmp_path):
    """Start a conversion into ``out`` that stands still until its input is closed."""
    arguments = [str(tiny(Recipe()).folder), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST, *arguments],
        cwd=Path(internvl3_mlx.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def second(first, target, **options):
    """Convert into the same folder, and let the other go on when this one waits for it."""
    with conversion_progress(quiet=False) as show:

        def go_on(event):
            show(event)
            if event.stage == "wait":
                first.stdin.close()

        source = tiny(Recipe()).folder
        return convert_model(source, target, verify=False, on_progress=go_on, **options)


def test_the_second_of_two_equal_conversions_waits_and_both_end_well(first, tmp_path, capsys):
    target = tmp_path / "out"
    assert second(first, target, command="a").target == target
    said = capsys.readouterr().err
    assert said == f"note: another process is writing {target}; waiting for it\n"
    assert os.listdir(tmp_path) == ["out"]


def test_another_result_is_not_replaced_unasked(first, tmp_path):
    with pytest.raises(WriteError, match="out exists; name another folder, or pass --overwrite"):
        second(first, tmp_path / "out", bits=4, group_size=32)
    assert os.listdir(tmp_path) == ["out"]


def test_with_overwrite_the_second_replaces_the_first(first, tmp_path):
    second(first, tmp_path / "out", bits=4, group_size=32, overwrite=True)
    assert "quantization" in (tmp_path / "out" / "config.json").read_text()
