"""Start one command on several hosts: here as rank 0, on the others over ssh.

``mlx.launch`` starts the same processes, but gives rank 0 a pipe for a terminal, never passes on
the end of its input, and always ends with 0. Its script for a remote process is used as it is.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from internvl3_mlx.ending_signals import Handler, signal_handlers
from internvl3_mlx.multi_host.hosts import JACCL, Host, LaunchPlan

POLL_S = 0.2
PATIENCE_S = 15.0  # for rank 0 to find out by itself that another rank has ended
END_S = 8.0  # for the others to end after rank 0
SIGNAL_BASE = 128
FORWARDED = (signal.SIGTERM, signal.SIGHUP)
Report = Callable[[str], None]


@dataclass(eq=False)
class RemoteRank:
    """A follower's process, or the ssh to it. last_line: of what it wrote."""

    rank: int
    host: Host
    process: "subprocess.Popen[str]"
    last_line: str = ""
    ended: float | None = None

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last_line = line.strip() or self.last_line

    def has_failed(self) -> bool:
        """Whether it ended by an error some time ago."""
        if not self.process.poll():
            return False
        self.ended = self.ended or time.monotonic()
        return time.monotonic() - self.ended > PATIENCE_S


@dataclass(eq=False)
class Launch:
    """A run of one command on all hosts of a plan. folder: of files that end with it."""

    plan: LaunchPlan
    command: Sequence[str]
    folder: Path
    followers: list[RemoteRank] = field(default_factory=list[RemoteRank])

    @property
    def words(self) -> list[str]:
        return ["-m", "internvl3_mlx", *self.command]

    def files(self) -> dict[str, str]:
        """Return what MLX reads from files, by the variables that name them."""
        hosts = self.plan.hosts
        if self.plan.backend == JACCL:
            return {"MLX_IBV_DEVICES": json.dumps([one.rdma for one in hosts])}
        port = free_ports(hosts[0].address, self.plan.port, len(hosts))
        ring = [[f"{one.address}:{port + rank}"] for rank, one in enumerate(hosts)]
        return {"MLX_HOSTFILE": json.dumps(ring)}

    def variables(self) -> dict[str, str]:
        """Return the variables that are set on all hosts."""
        found = dict(one.partition("=")[::2] for one in self.plan.envs)
        if self.plan.backend == JACCL:
            found["MLX_JACCL_COORDINATOR"] = f"{self.plan.hosts[0].address}:{self.plan.port}"
        return found

    def run(self, report: Report) -> int:
        """Run to the end; return the exit code of rank 0. report: shows why a rank has failed."""
        files, variables = self.files(), self.variables()
        own = os.environ | variables | self.write(files)
        try:
            for rank, host in [*enumerate(self.plan.hosts)][1:]:
                self.followers.append(self.start(rank, host, files, variables, own))
            command = [self.plan.python, *self.words]
            first = subprocess.Popen(command, env=own | {"MLX_RANK": "0"})
            with first, signals_forwarded(first):
                return self.wait(first, report)
        finally:
            self.end_followers()

    def write(self, files: Mapping[str, str]) -> dict[str, str]:
        for name, content in files.items():
            (self.folder / name).write_text(content)
        return {name: str(self.folder / name) for name in files}

    def start(
        self,
        rank: int,
        host: Host,
        files: dict[str, str],
        variables: Mapping[str, str],
        own: Mapping[str, str],
    ) -> RemoteRank:
        """Start a follower: here by itself, elsewhere by ssh, whose end ends it too."""
        command = [self.plan.python, *self.words]
        env = {**own, "MLX_RANK": str(rank)}
        if not host.is_local:
            command = ["ssh", "-tt", "-o", "LogLevel=QUIET", host.name]
            command.append(self.remote_script(rank, files, variables))
        process = subprocess.Popen(
            command,
            env=env if host.is_local else None,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL if host.is_local else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is rank 0's
        )
        started = RemoteRank(rank, host, process)
        threading.Thread(target=started.read, daemon=True).start()
        return started

    def remote_script(self, rank: int, files: dict[str, str], variables: Mapping[str, str]) -> str:
        from mlx._distributed_utils.launch import RemoteProcess

        envs = [f"{name}={value}" for name, value in variables.items()]
        script: Any = RemoteProcess.make_launch_script(
            rank, self.plan.python, None, files, envs, self.words, False
        )
        return str(script)

    def wait(self, first: "subprocess.Popen[bytes]", report: Report) -> int:
        """Wait for rank 0; end it if another rank has failed and it does not find out."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = first.wait(POLL_S)
                return SIGNAL_BASE - code if code < 0 else code
            failed = next((one for one in self.followers if one.has_failed()), None)
            if failed is not None and first.poll() is None:
                about = failed.last_line or f"exit code {failed.process.returncode}"
                report(f"rank {failed.rank} ({failed.host.name}) ended: {about}")
                first.terminate()
                with suppress(subprocess.TimeoutExpired):
                    first.wait(END_S)
                first.kill()
                first.wait()
                return 1

    def end_followers(self) -> None:
        """Leave no process behind: wait a little, then end what is left."""
        deadline = time.monotonic() + END_S
        for one in self.followers:
            for end in (lambda: None, one.process.terminate, one.process.kill):
                end()
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(deadline - time.monotonic(), 1.0))
                    break
            for stream in (one.process.stdin, one.process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()


@contextmanager
def signals_forwarded(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave Ctrl-C to rank 0, which the terminal tells itself, and pass other ends on to it."""
    handlers: dict[int, Handler] = {signal.SIGINT: lambda _number, _frame: None}
    for number in FORWARDED:
        handlers[number] = lambda received, _: process.send_signal(received)
    with signal_handlers(handlers):
        yield


def free_ports(address: str, wanted: int, count: int) -> int:
    """Return the first of ``count`` ports, ``wanted`` unless one of them is taken here."""
    for first in (wanted, *range(wanted + count, wanted + 50 * count, count)):
        with suppress(OSError):
            for port in range(first, first + count):
                with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind((address, port))
            return first
    return wanted


def launch(plan: LaunchPlan, command: Sequence[str], report: Report) -> int:
    """Run a command on all hosts of a plan; return the exit code of rank 0."""
    with TemporaryDirectory() as folder:
        return Launch(plan, command, Path(folder)).run(report)
