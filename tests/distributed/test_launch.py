"""``internvl3 launch``: hosts are checked first, over an ssh that stands in for the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.loaded_models import tiny
from fixtures.rank_processes import INTERNVL3, PATIENCE_S
from fixtures.tiny import Recipe

from internvl3_mlx.cli.launch import model_of
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.ranks import join_ranks
from internvl3_mlx.distributed import process_group
from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.mirror import different_file, folder_facts
from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.multi_host.hosts import (
    Host,
    LaunchPlan,
    check_hosts,
    check_plan,
    local_hosts,
    named_hosts,
    read_hostfile,
)

DOG = str(DEMO_FOLDER / "samples" / "dog.jpg")
# what each host does: mac2 is ready, and the others are not
SSH = """#!/bin/bash
while [ "${1:0:1}" = "-" ]; do case "$1" in -o) shift 2;; *) shift;; esac; done
echo "$1" >> "$0.log"
case "$1" in
  mac2) exec bash -c "$2";;
  away) echo "ssh: connect to host away port 22: Operation timed out" >&2; exit 255;;
  bare) echo "bash: no such file" >&2; exit 127;;
  broken) echo "Traceback" >&2; echo "ModuleNotFoundError: No module named 'mlx'" >&2; exit 1;;
  mute) exit 0;;
  *) bash -c "$2" | sed -e "s/$(cat "$0.$1")/";;
esac
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Put the stand-in on the path; return where its answers can be changed."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(SSH)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return script


def plan_with(name):
    return LaunchPlan((Host("127.0.0.1", "127.0.0.1"), Host(name, "127.0.0.1")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("away", "cannot reach away over ssh: .*timed out; `ssh away` must work without"),
        ("bare", "bare has no .*python.*; install internvl3-mlx there at the same path"),
        ("broken", "internvl3-mlx does not run on broken: ModuleNotFoundError: No module"),
        ("mute", "mute gave no readable answer"),
    ],
)
def test_a_host_that_cannot_take_part_is_named(ssh, name, message):
    with pytest.raises(UserError, match=message):
        check_hosts(plan_with(name), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"mlx": "[^"]*"/"mlx": "0.1"', "odd has mlx 0.1, this machine .*; make it the same"),
        ('"COMPILE": ""/"COMPILE": ""', None),
        ('"INTERNVL3_COMPILE": ""/"INTERNVL3_COMPILE": "on"', "odd has INTERNVL3_COMPILE on, this"),
        ('"model": {[^}]*}/"model": {}', "odd does not have demo; run there: internvl3 models"),
        ('"config.json": "[^"]*"/"config.json": "x"', "odd: config.json is another file; copy"),
        ('"unreachable": ""/"unreachable": "refused"', r"odd cannot connect to this .*\(refused\)"),
    ],
)
def test_what_differs_on_a_host_is_named(ssh, monkeypatch, change, message):
    monkeypatch.delenv("INTERNVL3_COMPILE", raising=False)
    Path(f"{ssh}.odd").write_text(change)
    if message is None:
        check_hosts(plan_with("odd"), "demo")
        return
    with pytest.raises(UserError, match=message):
        check_hosts(plan_with("odd"), "demo")


def test_a_command_runs_on_two_hosts_and_answers_once(ssh, tmp_path):
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "mac2", "ips": ["127.0.0.1"]}]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    words = ["launch", "--hostfile", "hosts.json", "--quiet", "generate", "--model", "demo"]
    done = subprocess.run(
        [*INTERNVL3, *words, DOG, "What is this?", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["text"], found["usage"]["image_tokens"]) == ("dog", 80)
    assert found["timing"]["prefill_tps"] > 0
    assert Path(f"{ssh}.log").read_text().split() == ["mac2", "mac2"]  # the check, and the rank


def children(pid):
    """List the processes that a process has started."""
    rows = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [map(int, line.split()) for line in rows.stdout.splitlines()]
    return [own for own, parent in pairs if parent == pid]


def wait_for(process, stream, wanted=b""):
    """Wait until a process has written something, or what is wanted."""
    deadline, found = time.monotonic() + PATIENCE_S, b""
    os.set_blocking(stream.fileno(), False)
    while not found.strip() or wanted not in found:
        found += stream.read() or b""
        assert process.poll() is None, found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_is_the_commands_and_no_process_is_left(tmp_path):
    model = str(tiny(Recipe()).folder)
    flags = ["--no-history", "--max-tokens", "100000", "--temp", "0"]  # it never ends
    process = subprocess.Popen(
        [*INTERNVL3, "launch", "-n", "2", "chat", "--model", model, *flags],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.stdin.write(b"What?\n")
        process.stdin.flush()
        wait_for(process, process.stdout)
        started = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        wait_for(process, process.stderr, b"stopped; the text so far")
        process.stdin.write(b"And then?\n")
        process.stdin.flush()
        wait_for(process, process.stdout)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_exit_code_is_the_commands_own(tmp_path):
    done = subprocess.run(
        [*INTERNVL3, "launch", "-n", "2", "generate", "--model", "demo", "none.jpg", "What?"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error:") == 1
    assert "none.jpg" in done.stderr


def test_mlx_launch_starts_the_same_command(tmp_path):
    launch = "from mlx._distributed_utils.launch import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", launch, "-n", "2", "--backend", "ring", "--", *INTERNVL3,
         "generate", "--model", "demo", DOG, "What is this?"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout == "dog\n", done.stderr
    assert "error" not in done.stderr


def test_commands_of_one_process_are_refused(monkeypatch):
    result = CliRunner().invoke(main, ["launch", "-n", "2", "convert", "demo"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "internvl3 convert cannot run on several hosts" in result.stderr
    started = ProcessGroup(0, 2)
    monkeypatch.setattr(process_group, "init_distributed", lambda: started)
    with pytest.raises(UserError, match="internvl3 bench runs in one process; start it without"):
        join_ranks("bench")
    assert join_ranks("train") is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LaunchPlan(local_hosts(1)), "one host needs no launch"),
        (LaunchPlan((Host("far", "192.0.2.1"), Host("b", "192.0.2.2"))), "far .* not this machine"),
        (LaunchPlan((*local_hosts(1), Host("b", "192.0.2.2"))), "b cannot reach 127.0.0.1"),
        (LaunchPlan(local_hosts(2), "mpi"), "unknown backend 'mpi'; choose from ring, jaccl"),
        (LaunchPlan(local_hosts(2), "jaccl"), "names no RDMA device for each pair"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(plan, message):
    with pytest.raises(UserError, match=message):
        check_plan(plan)


def test_a_hostfile_is_read_as_mlx_launch_reads_it(tmp_path):
    path = tmp_path / "hosts.json"
    rdma = [[None, "rdma_en5"], ["rdma_en5", None]]
    hosts = [{"ssh": f"mac{n}", "ips": [f"10.0.0.{n}"], "rdma": rdma[n]} for n in range(2)]
    path.write_text(json.dumps({"backend": "jaccl", "envs": ["A=b"], "hosts": hosts}))
    plan = read_hostfile(path)
    assert (plan.backend, plan.envs) == ("jaccl", ("A=b",))
    assert plan.hosts[1] == Host("mac1", "10.0.0.1", ("rdma_en5", None))
    for text in ("{", '[{"ssh": "mac1"}]', '[{"ips": []}]'):
        path.write_text(text)
        with pytest.raises(UserError, match="not a hostfile of mlx.launch"):
            read_hostfile(path)
    with pytest.raises(UserError, match=r"no address is known for the host 'no\.invalid'"):
        named_hosts(["no.invalid"])


def test_the_model_of_a_command_is_found():
    assert model_of(("chat", "--model", "8b", "--quiet")) == "8b"
    assert model_of(("chat", "--model=8b")) == "8b"
    assert model_of(("chat",)) is None


def test_files_of_two_model_folders_are_compared(tmp_path):
    ours = folder_facts(DEMO_FOLDER)
    assert different_file(ours, ours) is None
    assert {"config.json", "model.safetensors"} <= {*ours}
    assert "model.safetensors is missing" in different_file(
        {k: v for k, v in ours.items() if k != "model.safetensors"}, ours
    )
    assert "more.json is not among rank 0's" in different_file(ours | {"more.json": "x"}, ours)
    assert "config.json is another" in different_file(ours | {"config.json": "x"}, ours)
