"""Rank 0 leads, the others follow: what comes out is what one process computes."""

import json
import sys
from pathlib import Path

import fixtures.rank_checks
import pytest
from fixtures.loaded_models import tiny
from fixtures.rank_checks import run_checks
from fixtures.rank_processes import INTERNVL3, finish, rank_processes
from fixtures.tiny import Recipe

from internvl3_mlx import load

PROGRAM = fixtures.rank_checks.__file__
SEARCH = {"PYTHONPATH": f"{Path(PROGRAM).parents[1]}:{Path(PROGRAM).parents[2]}"}


@pytest.fixture(scope="module")
def model():
    return str(tiny(Recipe()).folder)


@pytest.fixture(scope="module")
def led(model, tmp_path_factory):
    """Run the checks on two ranks; return what rank 0 found, and how both ended."""
    folder = tmp_path_factory.mktemp("led")
    program = [sys.executable, "-m", "fixtures.rank_checks", model, "found.json"]
    commands = [program, [*INTERNVL3, "generate"]]
    with rank_processes(folder, commands, rank0=SEARCH) as processes:
        ends = [finish(process) for process in processes]
    assert (folder / "found.json").exists(), ends
    return json.loads((folder / "found.json").read_text()), ends


@pytest.fixture(scope="module")
def alone(model):
    return json.loads(json.dumps(run_checks(load(model))))


@pytest.mark.parametrize("part", ["questions", "conversation", "interleaved", "together", "errors"])
def test_two_ranks_find_what_one_process_finds(led, alone, part):
    assert led[0][part] == alone[part]


def test_the_others_end_as_rank_0_does_and_say_nothing(led):
    (_, out, err), follower = led[1]
    assert follower == (3, "", ""), (out, err)
