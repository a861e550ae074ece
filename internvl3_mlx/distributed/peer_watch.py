"""Watch over the other processes of a run: name one that is silent, and end instead of waiting."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from internvl3_mlx.distributed.heartbeat import Heartbeat, Peer
from internvl3_mlx.errors import InternVL3Error

POLL_S = 0.2  # how often a waiting rank looks at its peers
SILENT_S = 5.0  # heartbeats come twice a second
NOTICE_S, NOTICE_AGAIN_S = 8.0, 60.0  # of waiting for a silent rank, until a note appears
LOST_S = 2.0  # a rank whose connection broke is named by its silence
LOST_MARK = "[ring]"  # how MLX reports a lost connection, in a RuntimeError
ADVICE = "it may be asleep, swapping or stopped (caffeinate -i keeps a Mac awake)"


class PeerError(InternVL3Error):
    """Another process of the run does not answer, or is gone."""


@dataclass(eq=False)
class PeerWatch:
    """Waits for sums over all ranks, with an eye on the peers.

    size: number of ranks. heartbeat: None where heartbeats do not get through. timeout: seconds of
    silence that end the run.
    """

    rank: int
    size: int
    timeout: float
    heartbeat: Heartbeat | None = None
    notify: Callable[[str], None] = field(default=lambda _: None)
    noticed: float = 0.0

    def wait(self, arrays: Any) -> None:
        """Evaluate arrays that depend on other ranks. Raises PeerError when one does not answer.

        The computation cannot be interrupted, so another thread waits for it.
        """
        done, failures = threading.Event(), list[Exception]()

        def finish() -> None:
            try:
                mx.eval(arrays)
            except Exception as error:  # noqa: BLE001  raised again in the waiting thread
                failures.append(error)
            done.set()

        try:
            mx.async_eval(arrays)
        except RuntimeError as error:
            raise self.explained(error) from error
        threading.Thread(target=finish, daemon=True).start()
        with self.waiting():
            started = time.monotonic()
            while not done.wait(POLL_S):
                self.check(time.monotonic() - started)
        if failures:
            raise self.explained(failures[0]) from failures[0]

    def explained(self, error: Exception) -> Exception:
        """Return the error to raise: PeerError for a lost connection, any other as it is."""
        if LOST_MARK not in str(error):
            return error
        leave_without_waiting()
        return PeerError(self.describe_lost())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell the peers that this rank waits for them."""
        self.noticed = 0.0
        if self.heartbeat is None:
            yield
            return
        self.heartbeat.waits = True
        try:
            yield
        finally:
            self.heartbeat.waits = False

    def check(self, waited: float) -> None:
        """Name who is silent after some seconds; raise PeerError after the timeout."""
        silent = self.silent_ranks(min(SILENT_S, self.timeout / 2))
        if silent and waited > NOTICE_S and waited > self.noticed:
            self.noticed = waited + NOTICE_AGAIN_S
            self.notify(
                f"waiting for {self.names([*silent])}, silent for {max(silent.values()):.0f} s; "
                f"{ADVICE}; after {self.timeout:.0f} s the run is saved and ends"
            )
        reason = None
        if silent and min(waited, max(silent.values())) > self.timeout:
            late = [rank for rank, age in silent.items() if age > self.timeout] or [*silent]
            reason = f"{self.names(late)} did not answer for {self.timeout:.0f} s; {ADVICE}"
        elif waited > self.timeout and not silent and self.all_wait():
            reason = f"all processes have waited for each other for {self.timeout:.0f} s"
        elif waited > self.timeout and self.heartbeat is None:
            others = [rank for rank in range(self.size) if rank != self.rank]
            reason = f"{self.names(others)} did not answer for {self.timeout:.0f} s"
        if reason:
            leave_without_waiting()
            raise PeerError(reason)

    def silent_ranks(self, longer_than: float) -> dict[int, float]:
        """Return the ranks that have not been heard for so long, with their silence in seconds."""
        if self.heartbeat is None:
            return {}
        now = time.monotonic()
        ages = {rank: now - peer.heard for rank, peer in self.heartbeat.peers.copy().items()}
        if self.rank and ages.get(0, 0.0) > longer_than:
            return {0: ages[0]}  # what is known of the others comes from rank 0
        return {rank: age for rank, age in ages.items() if age > longer_than}

    def all_wait(self) -> bool:
        """Whether every peer is heard, and waits too."""
        peers: dict[int, Peer] = self.heartbeat.peers.copy() if self.heartbeat else {}
        return len(peers) == self.size - 1 and all(peer.waits for peer in peers.values())

    def describe_lost(self) -> str:
        """Say which connection was lost: that of the ranks that have fallen silent."""
        deadline = time.monotonic() + LOST_S
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent: dict[int, float] = {}
        while not silent and time.monotonic() < deadline and len(others) > 1:
            time.sleep(POLL_S)
            silent = self.silent_ranks(LOST_S / 2)
        return f"the connection to {self.names([*silent] or others)} was lost"

    def names(self, ranks: list[int]) -> str:
        """Name ranks and their machines: ``rank 1 (mac-mini.local)``."""
        known = self.heartbeat.peers if self.heartbeat else {}
        named = [
            f"rank {rank} ({known[rank].host})" if rank in known else f"rank {rank}"
            for rank in sorted(ranks)
        ]
        return " and ".join(named) if len(named) < 3 else ", ".join(named)


def leave_without_waiting() -> None:
    """End the process at its exit without waiting for the sum that never finishes."""
    atexit.register(_leave)


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(PeerError.exit_code)
