"""Rank 0 leads, the others follow: what is said between them beside the sums of the model.

A connection of its own takes the messages. They are no collectives, so that none ever comes between
those of a step that is computed ahead; they are sent one way, and rank 0 waits for no answer while
it generates. A thread on every rank ends the process when another one is silent, or gone.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import mlx.core as mx

from internvl3_mlx.distributed.heartbeat import (
    launch_hosts,
    listen,
    new_token,
    token_address,
)
from internvl3_mlx.distributed.peer_watch import ADVICE, POLL_S, PeerError, PeerWatch
from internvl3_mlx.distributed.process_group import (
    CONNECT_S,
    PeerStoppedError,
    ProcessGroup,
    open_heartbeat,
)
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.distributed.wire import Link, Types
from internvl3_mlx.errors import InternVL3Error, UserError

TIMEOUT_VARIABLE = "INTERNVL3_PEER_TIMEOUT"
PEER_TIMEOUT_S = 10.0  # of silence; heartbeats come twice a second
HELLO_BYTES = 65_536  # of the first message, before a connection is known to be of this run
SETTLE_S = 5.0  # until all ranks have ended a step that failed on one
Facts = Mapping[str, str]  # what must be the same on all ranks, by its name
Report = Callable[[str], None]  # shows one line before the process ends


@dataclass(eq=False)
class Rank:
    """One process of the team. watch: names the others. report: shows why this one ends."""

    group: ProcessGroup
    watch: PeerWatch
    report: Report
    closed: threading.Event = field(default_factory=threading.Event)
    ending: threading.Lock = field(default_factory=threading.Lock)
    streams: threading.local = field(default_factory=threading.local)

    @property
    def shard(self) -> Shard:
        """This rank's part of a model, to be computed by the thread that asks.

        MLX's streams belong to threads; a server computes in one of its own.
        """
        if threading.current_thread() is threading.main_thread():
            self.streams.own = self.group.stream
        elif not hasattr(self.streams, "own"):
            self.streams.own = mx.new_stream(mx.cpu)
        return Shard(self.group.rank, self.group.size, self.group.group, self.streams.own)

    def name(self, rank: int) -> str:
        return self.watch.names([rank])

    def start_watching(self) -> None:
        threading.Thread(target=self.keep_watch, daemon=True).start()

    def keep_watch(self) -> None:
        """End the process once another rank has been silent for too long."""
        while not self.closed.wait(POLL_S):
            silent = self.watch.silent_ranks(self.watch.timeout)
            if silent:
                names = self.watch.names([*silent])
                self.end(f"{names} did not answer for {self.watch.timeout:.0f} s; {ADVICE}")

    def end(self, line: str, code: int = PeerError.exit_code) -> None:
        """End the process now: a sum that waits for another rank cannot be interrupted."""
        if self.closed.is_set() or not self.ending.acquire(blocking=False):
            return
        if line:
            self.report(line)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)

    def close(self) -> None:
        self.closed.set()
        if self.watch.heartbeat is not None:
            self.watch.heartbeat.close()


@dataclass(eq=False)
class Leader(Rank):
    """Rank 0. links: to the others. answers: what they sent, with their rank.

    open_calls: the numbers of the calls in progress. released: what rank 0 has dropped, to be
    dropped by the others as well.
    """

    links: dict[int, Link] = field(default_factory=dict[int, Link])
    answers: Queue[tuple[int, dict[str, Any]]] = field(default_factory=Queue)
    open_calls: set[int] = field(default_factory=set[int])
    released: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    last_number: int = 0

    def new_number(self) -> int:
        self.last_number += 1
        return self.last_number

    def tell(self, kind: str, **content: Any) -> None:
        """Send a message to all followers, after what was released before."""
        released, self.released = self.released, []
        for link in self.links.values():
            try:
                if released:
                    link.send({"kind": "release", "released": released})
                link.send({"kind": kind, **content})
            except OSError:
                return  # the thread that listens to this rank ends the process

    def start_listening(self) -> None:
        for rank, link in self.links.items():
            threading.Thread(target=self.listen, args=(rank, link), daemon=True).start()

    def listen(self, rank: int, link: Link) -> None:
        """Take in what a follower answers; without its connection the process ends."""
        while True:
            try:
                answer = link.receive()
            except (OSError, ValueError, TypeError):
                self.end(f"the connection to {self.name(rank)} was lost")
                return
            if answer["kind"] == "failed":
                self.settle(rank, answer)
            else:
                self.answers.put((rank, answer))

    def settle(self, rank: int, answer: dict[str, Any]) -> None:
        """End the process where a follower failed in a step that succeeds here."""
        deadline = time.monotonic() + SETTLE_S
        while answer["call"] in self.open_calls:
            if time.monotonic() > deadline:
                self.end(f"{self.name(rank)} failed: {answer['problem']}")
                return
            time.sleep(POLL_S)

    def collect(self, kind: str, number: int, timeout: float | None = None) -> dict[int, Any]:
        """Wait for an answer of each follower. Where one is missing in the end, it is left out."""
        found: dict[int, Any] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(found) < len(self.links):
            left = POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            with suppress(Empty):
                rank, answer = self.answers.get(timeout=min(left, POLL_S))
                if (answer["kind"], answer["number"]) == (kind, number):
                    found[rank] = answer
        return found

    def require(self, kind: str, number: int) -> None:
        """Wait for all followers; raise UserError with the first one's problem, if one has any."""
        for rank, answer in sorted(self.collect(kind, number).items()):
            if answer["problem"]:
                raise UserError(f"{self.name(rank)}: {answer['problem']}")

    def after_failure(self, call: int, error: BaseException) -> None:
        """Wait until all have left a step that failed here, or end the process by its error."""
        answers = self.collect("closed", call, SETTLE_S)
        missing = [rank for rank in self.links if rank not in answers]
        if missing:
            self.end(f"{error} ({self.watch.names(missing)} could not end the step)")

    def dismiss(self, code: int) -> None:
        """Let the followers end as this process does."""
        self.closed.set()
        with suppress(OSError):
            self.tell("bye", code=code)
        for link in self.links.values():
            with suppress(OSError):
                link.connection.shutdown(socket.SHUT_WR)
        self.close()


@dataclass(eq=False)
class Follower(Rank):
    """Any other rank. inbox: what rank 0 has sent, in order."""

    link: Link | None = None
    inbox: Queue[dict[str, Any]] = field(default_factory=Queue)

    def start_listening(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Take in messages. After the last one, or without rank 0, this process ends too.

        It may wait in a sum that rank 0 has left.
        """
        assert self.link is not None
        while True:
            try:
                message = self.link.receive()
            except (OSError, ValueError, TypeError):
                self.end(f"the connection to {self.name(0)} was lost")
                return
            self.inbox.put(message)
            if message["kind"] == "bye":
                if not self.closed.wait(SETTLE_S):
                    self.end("", message["code"])
                return

    def messages(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.inbox.get()

    def answer(self, kind: str, **content: Any) -> None:
        assert self.link is not None
        with suppress(OSError):  # the thread that listens ends the process
            self.link.send({"kind": kind, **content})


def peer_timeout() -> float:
    """Return after how many seconds of silence a rank counts as lost. Raises UserError."""
    given = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(given or PEER_TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if seconds < 1:
        raise UserError(f"{TIMEOUT_VARIABLE}={given} is not a number of seconds, 1 or more")
    return seconds


def open_team(group: ProcessGroup, facts: Facts, types: Types, report: Report) -> Leader | Follower:
    """Connect rank 0 with the others, and compare the facts. types: what messages may hold.

    Raises UserError on rank 0 where facts differ, and PeerStoppedError on the others.
    """
    timeout = peer_timeout()
    server, address = (None, [0] * 5)
    if group.is_main:
        with suppress(OSError):
            server, address = listen(launch_hosts(), socket.SOCK_STREAM)
            server.listen()
    token = new_token() if server is not None else 0
    numbers = mx.array([float(token), *map(float, address)])
    token, host, port = token_address(group.broadcast([numbers])[0])
    if not token:
        raise InternVL3Error("rank 0 cannot open a port for the other ranks; see its firewall")
    watch = PeerWatch(group.rank, group.size, timeout, open_heartbeat(group))
    if watch.heartbeat is not None:
        watch.heartbeat.start()
    if server is None:
        return join_team(Follower(group, watch, report), (host, port), token, facts, types)
    return gather_team(Leader(group, watch, report), server, token, facts, types)


def gather_team(
    leader: Leader, server: socket.socket, token: int, facts: Facts, types: Types
) -> Leader:
    """Rank 0: take in the others, and refuse what differs."""
    server.settimeout(CONNECT_S)
    found: dict[int, Facts] = {}
    while len(leader.links) < leader.group.size - 1:
        try:
            link = Link(server.accept()[0], types)
            link.connection.settimeout(CONNECT_S)
            hello = link.receive(HELLO_BYTES)
        except TimeoutError:
            missing = [r for r in range(1, leader.group.size) if r not in leader.links]
            raise PeerError(f"{leader.watch.names(missing)} did not connect") from None
        except (OSError, ValueError, TypeError, LookupError):
            continue
        if not isinstance(hello, dict) or hello.get("token") != token:  # of another run
            link.close()
            continue
        link.connection.settimeout(None)
        link.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        leader.links[hello["rank"]], found[hello["rank"]] = link, hello["facts"]
    server.close()
    problem = next(
        filter(None, (differs(leader, r, f, facts) for r, f in sorted(found.items()))), ""
    )
    leader.tell("welcome", problem=problem)
    if problem:
        leader.close()
        raise UserError(problem)
    leader.start_listening()
    leader.start_watching()
    return leader


def differs(leader: Leader, rank: int, theirs: Facts, ours: Facts) -> str | None:
    """Name the first fact that is another on a rank."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            return (
                f"{leader.name(rank)} has {name} {theirs.get(name) or 'not set'}, rank 0 has "
                f"{value or 'not set'}; make it the same on all hosts"
            )
    return None


def join_team(
    follower: Follower, address: tuple[str, int], token: int, facts: Facts, types: Types
) -> Follower:
    """Other ranks: connect to rank 0."""
    try:
        connection = socket.create_connection(address, CONNECT_S)
    except OSError as error:
        raise PeerError(
            f"cannot connect to rank 0 at {address[0]}:{address[1]} ({error}); allow incoming "
            "connections to Python in its firewall"
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    follower.link = Link(connection, types)
    follower.answer("hello", token=token, rank=follower.group.rank, facts=dict(facts))
    try:
        problem = follower.link.receive()["problem"]
    except (OSError, ValueError) as error:
        raise PeerError("the connection to rank 0 was lost") from error
    if problem:
        raise PeerStoppedError(f"rank 0 stopped: {problem}", UserError.exit_code)
    connection.settimeout(None)
    follower.start_listening()
    follower.start_watching()
    return follower


TEAM: list[Leader | Follower] = []  # that this process belongs to, if any


def current_team() -> Leader | Follower | None:
    return TEAM[-1] if TEAM else None
