"""Processes of a run that hang, get lost or refuse: the others name them and end, saved."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from fixtures.rank_processes import PATIENCE_S, free_ports
from fixtures.train_sessions import small_config, write_data

from internvl3_mlx.distributed.heartbeat import Heartbeat, Peer, listen, new_token, ring_hosts
from internvl3_mlx.distributed.peer_watch import PeerError, PeerWatch
from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.training.checkpoint import checkpoint_update, list_checkpoints
from internvl3_mlx.training.config_file import write_config_file

SETTINGS = {
    "batch_size": 1, "grad_accumulation_steps": 1, "lora_dropout": 0.1, "iters": 2000,
    "save_every": 1, "keep_last": 2, "peer_timeout": 3,
}  # fmt: skip
COMMAND = [sys.executable, "-u", "-m", "internvl3_mlx", "train"]


@pytest.fixture
def start_ranks(tmp_path):
    """Start two ranks of ``internvl3 train`` as the launcher does, but leave them alone."""
    processes = []

    def start(*words):
        hosts = [[f"127.0.0.1:{port}"] for port in free_ports(2)]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        for rank in range(2):
            env = os.environ | {
                "MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json"),
                "INTERNVL3_CACHE": str(tmp_path / "cache"),
            }  # fmt: skip
            processes.append(
                subprocess.Popen(
                    [*COMMAND, "-c", "train.yaml", *words],
                    cwd=tmp_path,
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            )
        return processes

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_folder(tmp_path):
    write_data(tmp_path / "data", 7)
    write_config_file(small_config(tmp_path, **SETTINGS), tmp_path / "train.yaml")
    return tmp_path / "run"


def wait_for_checkpoint(folder):
    deadline = time.monotonic() + PATIENCE_S
    while not list_checkpoints(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hung", "lost"])
def test_a_hung_or_lost_peer_is_named_and_the_run_is_saved(run_folder, start_ranks, number):
    main, other = start_ranks()
    wait_for_checkpoint(run_folder)
    other.send_signal(number)
    output, _ = main.communicate(timeout=PATIENCE_S)
    assert main.returncode == 1, output
    host = re.escape(socket.gethostname())
    what = r"did not answer for 3 s; it may be asleep.*" if number == signal.SIGSTOP else "was lost"
    what = rf"error: (the connection to )?rank 1 \({host}\) {what}; the run is saved up to update "
    [line] = [line for line in output.splitlines() if line.startswith("error:")]
    found = re.fullmatch(what + r"(\d+); resume with: internvl3 train --resume .*", line)
    assert found, output
    last = list_checkpoints(run_folder)[-1]
    assert checkpoint_update(last) == int(found[2])
    saved = json.loads((last / "state.json").read_text())
    assert saved["micro_steps"] == saved["update"]  # whole updates only
    assert mx.load(str(last / "state.safetensors"))


def test_a_resume_that_rank_0_refuses_ends_every_rank(run_folder, start_ranks):
    processes = start_ranks("--resume")
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "error: no checkpoint in" in outputs[0]
    assert "error: rank 0 stopped: no checkpoint in" in outputs[1]


def test_heartbeats_tell_who_answers_and_who_waits(monkeypatch):
    monkeypatch.setenv("MLX_HOSTFILE", '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]')
    connection, [*host, port] = listen(ring_hosts())
    assert host == [127, 0, 0, 1]
    token = new_token()
    main = Heartbeat(0, token, connection)
    others = [
        Heartbeat(rank, t, socket.socket(socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", port))
        for rank, t in ((1, token), (2, token), (3, token + 1))
    ]
    others[1].waits = True
    for beat in (main, *others):
        beat.start()
    deadline = time.monotonic() + 10
    while not (2 in others[0].peers and 1 in others[1].peers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {*main.peers} == {1, 2}  # rank 3 is of another run
    assert (main.peers[1].waits, main.peers[2].waits) == (False, True)
    assert others[0].peers[2].host == socket.gethostname()
    assert not others[2].peers
    for beat in (main, *others):
        beat.close()


class Beats:
    """A heartbeat of what a test says."""

    def __init__(self, **peers):
        now = time.monotonic()
        self.peers = {
            int(name[1:]): Peer(now - age, "mac", waits) for name, (age, waits) in peers.items()
        }


def watch(rank=0, size=3, heartbeat=None):
    notes = []
    return PeerWatch(rank, size, 20.0, heartbeat, notes.append), notes


def test_a_silent_rank_is_named_and_ends_the_run_after_the_timeout(monkeypatch):
    monkeypatch.setattr("internvl3_mlx.distributed.peer_watch.leave_without_waiting", lambda: None)
    here, notes = watch(heartbeat=Beats(r1=(0.2, True), r2=(12.0, False)))
    here.check(3.0)
    assert not notes
    here.check(12.0)
    here.check(13.0)
    [note] = notes
    assert note.startswith("waiting for rank 2 (mac), silent for 12 s; it may be asleep")
    here, _ = watch(heartbeat=Beats(r1=(0.2, True), r2=(25.0, False)))
    with pytest.raises(PeerError, match=r"^rank 2 \(mac\) did not answer for 20 s"):
        here.check(25.0)
    here.check(15.0)  # silent for long, but nobody has waited for it that long


def test_a_rank_that_computes_for_long_is_waited_for(monkeypatch):
    monkeypatch.setattr("internvl3_mlx.distributed.peer_watch.leave_without_waiting", lambda: None)
    busy, notes = watch(heartbeat=Beats(r1=(0.2, True), r2=(0.3, False)))
    busy.check(9999.0)
    assert not notes
    stuck, _ = watch(heartbeat=Beats(r1=(0.2, True), r2=(0.3, True)))
    with pytest.raises(PeerError, match="all processes have waited for each other for 20 s"):
        stuck.check(25.0)
    alone, _ = watch(size=2)
    with pytest.raises(PeerError, match="rank 1 did not answer for 20 s"):
        alone.check(25.0)


def test_what_is_known_of_the_others_comes_from_rank_0():
    here, _ = watch(rank=1, heartbeat=Beats(r0=(9.0, False), r2=(9.0, False)))
    assert {*here.silent_ranks(5.0)} == {0}


def test_an_error_on_one_rank_is_raised_on_all():
    """Rank 1 of two; the other one reports an error."""

    class Second(ProcessGroup):
        def all_sum(self, tree):
            text = [float(byte) for byte in b'{"message": "no data\\nmore", "code": 2}']
            answers = {2: [1.0, 0.0], 1: [float(len(text))], len(text): text}
            return [mx.array(answers[tree[0].size])]

    with (
        pytest.raises(Exception, match=r"^rank 0 stopped: no data$") as caught,
        Second(1, 2).all_or_none(),
    ):
        pass
    assert caught.value.exit_code == 2
