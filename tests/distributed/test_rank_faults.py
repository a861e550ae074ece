"""A rank that is killed, stopped or set up otherwise: it is named, and every side ends."""

import os
import re
import shutil
import signal
import socket
import sys
import time

import pytest
from fixtures.loaded_models import tiny
from fixtures.rank_processes import INTERNVL3, PATIENCE_S, finish, rank_processes
from fixtures.tiny import Recipe

from internvl3_mlx.distributed.held_signals import HeldSignals

LIMIT = {"INTERNVL3_PEER_TIMEOUT": "2"}
HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def chat():
    folder = str(tiny(Recipe()).folder)
    flags = ["--no-history", "--quiet", "--max-tokens", "100000", "--no-ntk", "--temp", "0"]
    return [*INTERNVL3, "chat", "--model", folder, *flags]


def ask(process, question):
    """Ask something, and wait until the answer has begun."""
    process.stdin.write(question + "\n")
    process.stdin.flush()
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + PATIENCE_S
    while not (process.stdout.buffer.read() or b"").strip():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.set_blocking(process.stdout.fileno(), True)


def test_ctrl_c_ends_an_answer_and_a_lost_rank_the_chat(chat, tmp_path):
    with rank_processes(tmp_path, [chat, chat]) as (main, other):
        ask(main, "What?")
        main.send_signal(signal.SIGINT)
        ask(main, "And then?")  # the chat goes on, and the ranks agree on what was said
        assert other.poll() is None
        other.kill()
        code, _, err = finish(main)
    assert code == 1
    assert "stopped; the text so far is part of the conversation" in err
    assert re.search(rf"error: the connection to rank 1 \({HOST}\) was lost", err), err


def test_a_stopped_rank_is_named_and_ends_too(chat, tmp_path):
    with rank_processes(tmp_path, [chat, chat], rank0=LIMIT, rank1=LIMIT) as (main, other):
        ask(main, "What?")
        other.send_signal(signal.SIGSTOP)
        code, _, err = finish(main)
        assert code == 1
        line = rf"error: rank 1 \({HOST}\) did not answer for 2 s; it may be asleep"
        assert re.search(line, err), err
        other.send_signal(signal.SIGCONT)
        assert finish(other)[0] == 1


def test_without_rank_0_the_others_end(chat, tmp_path):
    with rank_processes(tmp_path, [chat, chat]) as (main, other):
        ask(main, "What?")
        main.kill()
        code, _, err = finish(other)
    assert code == 1
    assert "error: the connection to rank 0" in err


def test_ranks_with_other_settings_are_refused_before_anything_loads(chat, tmp_path):
    changed = {"INTERNVL3_COMPILE": "off"}
    with rank_processes(tmp_path, [chat, chat], rank1=changed) as processes:
        (code, _, err), (other_code, _, other_err) = map(finish, processes)
    assert (code, other_code) == (2, 2)
    assert "rank 1" in err
    assert "has INTERNVL3_COMPILE off, rank 0 has not set; make it the same on all hosts" in err
    assert "rank 0 stopped: rank 1" in other_err


def test_other_files_of_a_model_are_refused_and_a_full_disk_ends_all(tmp_path):
    for rank in range(2):
        shutil.copytree(tiny(Recipe()).folder, tmp_path / f"rank{rank}" / "model")
    template = tmp_path / "rank1" / "model" / "tokenizer_config.json"
    template.write_text(template.read_text() + " ")
    commands = [
        ["env", "-C", f"rank{rank}", *INTERNVL3, "generate", "--model", "model", "-p", "What?"]
        for rank in range(2)
    ]
    with rank_processes(tmp_path, commands) as processes:
        (code, _, err), (other_code, _, _) = map(finish, processes)
    assert (code, other_code) == (2, 2)
    assert re.search(r"error: rank 1 .*: tokenizer_config.json is another file; copy", err), err
    shutil.copy(tmp_path / "rank0" / "model" / template.name, template)
    words = " ".join([*commands[0], ">", "/dev/full"])
    with rank_processes(tmp_path, [["bash", "-c", words], commands[1]]) as processes:
        (code, _, err), (other_code, _, _) = map(finish, processes)
    assert (code, other_code) == (1, 1)
    assert "No space left" in err or "disk" in err


FAULT = """
import sys
from internvl3_mlx.generation.prefill import Prefill
from internvl3_mlx.cli.main import run
def fail(*_):
    raise ValueError("out of order")
Prefill.run = fail
run()
"""


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, rf"error: out of order \(rank 1 \({HOST}\) could not end the step\)"),
        (1, rf"error: rank 1 \({HOST}\) failed: ValueError: out of order"),
    ],
)
def test_an_error_of_one_rank_alone_ends_all(tmp_path, rank, message):
    words = ["generate", "--model", str(tiny(Recipe()).folder), "-p", "What?"]
    commands = [[*INTERNVL3, *words], [*INTERNVL3, *words]]
    commands[rank] = [sys.executable, "-c", FAULT, *words]
    with rank_processes(tmp_path, commands) as processes:
        (code, out, err), (other_code, _, _) = map(finish, processes)
    assert (code, out, other_code) == (1, "", 1)
    assert re.search(message, err), err


def test_a_signal_waits_for_the_end_of_a_step():
    signals, after = HeldSignals(), []
    with signals.held():
        signal.raise_signal(signal.SIGINT)
        after.append("step")
    after.append("left")
    with pytest.raises(KeyboardInterrupt):
        signals.deliver()
    assert after == ["step", "left"]
    signals.deliver()  # once only
