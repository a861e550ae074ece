"""Rank 0 leads, the others follow: what comes out is what one process computes."""

import json
import socket
import sys
from pathlib import Path

import fixtures.rank_checks
import mlx.core as mx
import numpy as np
import pytest
from fixtures.child_path import python_path
from fixtures.loaded_models import tiny
from fixtures.rank_checks import CHECKS, run_checks
from fixtures.rank_processes import INTERNVL3, finish, rank_processes
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.distributed.wire import ClosedError, Link
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.mirror import MESSAGE_TYPES
from internvl3_mlx.generation.processor import ModelInputs

PROGRAM = fixtures.rank_checks.__file__
SEARCH = {"PYTHONPATH": python_path(*Path(PROGRAM).parents[1:3])}


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


@pytest.mark.parametrize("part", [check.__name__ for check in CHECKS])
def test_two_ranks_find_what_one_process_finds(led, alone, part):
    assert led[0][part] == alone[part]


def test_what_several_processes_cannot_do_is_refused(led, alone):
    draft, save, after = led[0]["refused"]
    assert "a draft model cannot be used with a model that several processes hold" in draft
    assert "a prompt cache cannot be saved where several processes hold the model" in save
    assert after == alone["errors"][-1]


def test_every_rank_gets_the_numbers_of_rank_0():
    class Recorder(Shard):
        def sum(self, x):
            return x

    for dtype in (mx.int32, mx.float32):
        own = mx.array([3, 5], dtype)
        assert from_rank_0(Recorder(0, 2), own).tolist() == [3, 5]
        assert from_rank_0(Recorder(1, 2), own).tolist() == [0, 0]
        assert from_rank_0(Shard(), own) is own


def test_messages_come_back_as_they_were():
    inputs = ModelInputs([1, 2], (), np.arange(2, dtype=np.float32), (0.5,))
    config = GenerationConfig(json_schema={"type": ["a", {"b": None}]}, stop=("x",))
    sent = {"inputs": inputs, "config": config, "bytes": [b"ab", b""], "rows": [[1, 2.5], "t"]}
    ours, theirs = socket.socketpair()
    Link(ours).send(sent)
    found = Link(theirs, MESSAGE_TYPES).receive()
    assert found["config"] == config
    assert (found["bytes"], found["rows"]) == (sent["bytes"], sent["rows"])
    assert found["inputs"].token_ids == [1, 2]
    assert found["inputs"].positions.tolist() == [0.0, 1.0]
    Link(ours).send({"config": config})
    with pytest.raises(ValueError, match="unknown type 'GenerationConfig'"):
        Link(theirs).receive()
    with pytest.raises(TypeError, match="a object cannot be sent"):
        Link(ours).send(object())
    Link(ours).send("x" * 99)
    with pytest.raises(ValueError, match="a message of 101 bytes, 50 at most"):
        Link(theirs).receive(50)
    theirs.recv(200)
    ours.close()
    with pytest.raises(ClosedError):
        Link(theirs).receive()
    theirs.close()


def test_the_others_end_as_rank_0_does_and_say_nothing(led):
    (_, out, err), follower = led[1]
    assert follower == (3, "", ""), (out, err)
