"""Which hosts a run has, and whether they are ready for it."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.mirror import different_file
from internvl3_mlx.multi_host.probe import probe

RING, JACCL = "ring", "jaccl"
BACKENDS = (RING, JACCL)
LOCAL_NAMES = ("localhost", "127.0.0.1")
PORT = 32323  # that the ring listens on, counting up by rank: the launcher's own default
CONNECT_S, PROBE_S = 10, 120
SSH_FAILED, NOT_FOUND = 255, 127


@dataclass(frozen=True)
class Host:
    """One rank's host. name: for ssh. address: in the network. rdma: its device to each rank."""

    name: str
    address: str
    rdma: tuple[str | None, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.name in LOCAL_NAMES


@dataclass(frozen=True)
class LaunchPlan:
    """The hosts in the order of their ranks. envs: NAME=VALUE, set on all. python: on each host."""

    hosts: tuple[Host, ...]
    backend: str = RING
    envs: tuple[str, ...] = ()
    python: str = sys.executable
    port: int = PORT


def local_hosts(count: int) -> tuple[Host, ...]:
    return (Host("127.0.0.1", "127.0.0.1"),) * count


def named_hosts(names: Sequence[str]) -> tuple[Host, ...]:
    """Look up the addresses of hosts. Raises UserError for a name that has none."""
    found: list[Host] = []
    for name in names:
        try:
            found.append(Host(name, socket.gethostbyname(name)))
        except OSError as error:
            raise UserError(
                f"no address is known for the host {name!r} ({error.strerror or error}); check its "
                "name, or give addresses in a --hostfile"
            ) from error
    return tuple(found)


def read_hostfile(path: Path) -> LaunchPlan:
    """Read a hostfile of ``mlx.launch``. Raises UserError."""
    from mlx._distributed_utils.common import Hostfile  # imports MLX

    try:
        content = Hostfile.from_file(path)
        for host in content.hosts:
            if not host.ips:
                raise ValueError(f"{host.ssh_hostname} has no ips")
        hosts = tuple(Host(h.ssh_hostname, h.ips[0], tuple(h.rdma)) for h in content.hosts)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a hostfile of mlx.launch: {error}; mlx.distributed_config writes one"
        ) from error
    return LaunchPlan(hosts, content.backend or RING, tuple(content.envs))


def check_plan(plan: LaunchPlan) -> None:
    """Raise UserError for hosts that cannot be launched from here."""
    first, *others = plan.hosts
    if not others:
        raise UserError("one host needs no launch; name two or more, or give -n 2")
    if not is_here(first.address):
        raise UserError(
            f"the first host, {first.name} ({first.address}), is not this machine; run internvl3 "
            "launch there, or name this one first"
        )
    remote = next((one for one in others if not one.is_local), None)
    if first.is_local and remote is not None and not remote.address.startswith("127."):
        raise UserError(
            f"{remote.name} cannot reach {first.address}; name this machine as {remote.name} knows "
            "it, or by its address"
        )
    if plan.backend not in BACKENDS:
        raise UserError(f"unknown backend {plan.backend!r}; choose from {', '.join(BACKENDS)}")
    if plan.backend == JACCL and any(len(one.rdma) != len(plan.hosts) for one in plan.hosts):
        raise UserError(
            "the hostfile names no RDMA device for each pair of hosts; write it with "
            "mlx.distributed_config --backend jaccl, or use --backend ring"
        )


def is_here(address: str) -> bool:
    """Return whether an address is one of this machine's: only those can be bound."""
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as tried:
            tried.bind((address, 0))
    except OSError:
        return False
    return True


def check_hosts(plan: LaunchPlan, model: str | None) -> None:
    """Ask each other host for its versions, the model's files, and whether it reaches rank 0.

    Raises UserError for the first host that is not ready.
    """
    others = dict.fromkeys(host for host in plan.hosts[1:] if not host.is_local)
    if not others:
        return
    ours = probe({"model": model})
    if ours.get("problem"):
        raise UserError(str(ours["problem"]))
    first = plan.hosts[0].address
    with closing(socket.create_server((first, 0))) as server:
        request = {"model": model, "reach": f"{first}:{server.getsockname()[1]}"}
        for host in others:
            problem = host_problem(host, ask_host(host, plan.python, request), ours, model)
            if problem:
                raise UserError(problem)


def ask_host(host: Host, python: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the probe on a host over ssh. Raises UserError where that is not possible."""
    command = shlex.join([python, "-m", "internvl3_mlx.multi_host.probe", json.dumps(request)])
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", host.name, command]
    try:
        done = subprocess.run(
            ssh, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S
        )
    except FileNotFoundError as error:
        raise UserError("there is no ssh here to reach the other hosts") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{host.name} did not answer within {PROBE_S} s") from error
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == SSH_FAILED:
        raise UserError(
            f"cannot reach {host.name} over ssh: {last}; `ssh {host.name}` must work without a "
            "password"
        )
    if done.returncode == NOT_FOUND:
        raise UserError(
            f"{host.name} has no {python}; install internvl3-mlx there at the same path, or give "
            "--python"
        )
    if done.returncode:
        raise UserError(f"internvl3-mlx does not run on {host.name}: {last}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise UserError(f"{host.name} gave no readable answer: {last}") from error
    return answer


def host_problem(
    host: Host, theirs: Mapping[str, Any], ours: Mapping[str, Any], model: str | None
) -> str | None:
    """Say what keeps a host from taking part; None if nothing does."""
    for name, value in ours["facts"].items():
        other = theirs["facts"].get(name)
        if other != value:
            return (
                f"{host.name} has {name} {other or 'not set'}, this machine {value or 'not set'}; "
                "make it the same on all hosts"
            )
    if theirs.get("problem"):
        return f"{host.name}: {theirs['problem']}"
    if model and not theirs.get("model") and ours.get("model"):
        return f"{host.name} does not have {model}; run there: internvl3 models pull {model}"
    different = different_file(theirs.get("model", {}), ours.get("model", {}))
    if different:
        return f"{host.name}: {different}"
    if theirs.get("unreachable"):
        return (
            f"{host.name} cannot connect to this machine ({theirs['unreachable']}); check cable "
            "and addresses, and allow incoming connections to Python in the firewall"
        )
    return None
