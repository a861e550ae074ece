"""Heartbeats between the processes of a run: who answers, and who is waiting.

A sum over all ranks waits for the slowest without saying which one that is. So every rank sends a
small UDP packet to rank 0 twice a second, from a thread of its own, and gets back when each rank
was last heard and whether it waits too. A Mac that sleeps, or a process that is stopped, falls
silent; one that computes for long does not. The packets carry a token of the run, and nothing else
reads them. Where they do not get through, such as behind a firewall, waiting is only timed.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

INTERVAL_S = 0.5
PACKET_BYTES = 8192
TOKEN_BYTES = 3  # below 2^24, so that a float32 sum can carry it
HOSTFILE_VARIABLE = "MLX_HOSTFILE"  # a JSON list of the ring's addresses, or a file with it
COORDINATOR_VARIABLE = "MLX_JACCL_COORDINATOR"  # the address of rank 0, where RDMA is used
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Peer:
    """What is known of a rank. heard: when it last answered, by the local monotonic clock."""

    heard: float
    host: str = ""
    waits: bool = False


@dataclass(eq=False)
class Heartbeat:
    """Sends this rank's heartbeats and collects the others'. address: of rank 0's socket."""

    rank: int
    token: int
    connection: socket.socket
    address: tuple[str, int] | None = None
    peers: dict[int, Peer] = field(default_factory=dict[int, Peer])
    waits: bool = False
    closed: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        target = self.answer if self.address is None else self.report
        threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        self.closed.set()

    def answer(self) -> None:
        """Rank 0: note who reports, and answer with all that is known."""
        self.connection.settimeout(INTERVAL_S)
        while not self.closed.is_set():
            with suppress(OSError):
                raw, sender = self.connection.recvfrom(PACKET_BYTES)
                if (packet := self.read(raw)) is not None:
                    self.note(packet)
                    self.connection.sendto(self.packet(), sender)
        self.connection.close()

    def report(self) -> None:
        """Other ranks: report to rank 0, and take over what it knows."""
        assert self.address is not None
        self.connection.settimeout(INTERVAL_S)
        while not self.closed.is_set():
            with suppress(OSError):
                self.connection.sendto(self.packet(), self.address)
                if (packet := self.read(self.connection.recv(PACKET_BYTES))) is not None:
                    self.note(packet)
                    for rank, (age, host, waits) in packet["peers"].items():
                        if int(rank) not in (self.rank, packet["rank"]):
                            heard = time.monotonic() - age
                            self.peers[int(rank)] = Peer(heard, host, waits)
            self.closed.wait(INTERVAL_S)
        self.connection.close()

    def note(self, packet: dict[str, Any]) -> None:
        self.peers[packet["rank"]] = Peer(time.monotonic(), packet["host"], packet["waits"])

    def packet(self) -> bytes:
        now = time.monotonic()
        peers = {rank: (now - p.heard, p.host, p.waits) for rank, p in self.peers.copy().items()}
        host = socket.gethostname()
        content = {"token": self.token, "rank": self.rank, "host": host, "waits": self.waits}
        return json.dumps({**content, "peers": peers}).encode()

    def read(self, raw: bytes) -> dict[str, Any] | None:
        """Return the content of a packet of this run, None for any other."""
        with suppress(ValueError, TypeError, AttributeError):
            packet = json.loads(raw)
            if packet.get("token") == self.token:
                found: dict[str, Any] = packet
                return found
        return None


def listen(
    hosts: list[str], kind: socket.SocketKind = socket.SOCK_DGRAM
) -> tuple[socket.socket, list[int]]:
    """Open rank 0's socket on its address in the ring; return it with the address as numbers."""
    host = hosts[0] if hosts else local_address()
    connection = socket.socket(socket.AF_INET, kind)
    try:
        connection.bind((host, 0))
    except OSError:  # the address is one that others see, such as a router's
        connection.bind(("", 0))
    number = [int(part) for part in socket.gethostbyname(host).split(".")]
    return connection, [*number, connection.getsockname()[1]]


def new_token() -> int:
    return int.from_bytes(secrets.token_bytes(TOKEN_BYTES), "big")


def token_address(numbers: mx.array) -> tuple[int, str, int]:
    """Read a token, an address and its port, as rank 0 has sent them in one sum."""
    found = cast("list[float]", numbers.tolist())
    token, *host, port = (round(number) for number in found)
    return token, ".".join(map(str, host)), port


def launch_hosts() -> list[str]:
    """Return the addresses of the ranks that the launcher passes on: all, or that of rank 0."""
    coordinator = os.environ.get(COORDINATOR_VARIABLE, "").rpartition(":")[0]
    return ring_hosts() or ([coordinator] if coordinator else [])


def ring_hosts() -> list[str]:
    """Return the first address of each rank, from what the launcher of the ring passes on."""
    given = os.environ.get(HOSTFILE_VARIABLE, "")
    with suppress(OSError, ValueError, LookupError, TypeError):
        text = given if given.lstrip().startswith("[") else Path(given).read_text("utf-8")
        return [addresses[0].rpartition(":")[0] for addresses in json.loads(text)]
    return []


def local_address() -> str:
    """Return an address of this machine that others may reach."""
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return LOOPBACK
