"""Ctrl-C, termination and a closed terminal while ``internvl3 train`` runs."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from internvl3_mlx.cli import console
from internvl3_mlx.ending_signals import ENDING_SIGNALS, signal_handlers

STANDARD_STREAMS = (0, 1, 2)
HANGUP = getattr(signal, "SIGHUP", None)


class Interrupts:
    """Turns the first Ctrl-C into a request to stop; the second one stops at once.

    A termination and a closed terminal are requests to stop as well. hung_up: the terminal is gone.
    """

    def __init__(self) -> None:
        self.count = 0
        self.hung_up = False
        self.terminals: list[int] = []

    def received(self) -> bool:
        """Tell whether a stop has been requested."""
        return self.count > 0

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGHUP inside the context; nohup keeps ignoring SIGHUP."""
        self.terminals = [number for number in STANDARD_STREAMS if os.isatty(number)]
        numbers = [n for n in ENDING_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        with signal_handlers(dict.fromkeys(numbers, self.handle)):
            yield

    def handle(self, number: int, _: object) -> None:
        if number == HANGUP:
            self.hang_up()
            return
        if self.count:
            raise KeyboardInterrupt
        self.count += 1
        with suppress(OSError):
            console.note(
                "stopping after this update, then saving; press Ctrl-C again to stop at once"
            )

    def hang_up(self) -> None:
        """Stop as after Ctrl-C; what would be shown on the closed terminal goes nowhere."""
        self.count, self.hung_up = self.count + 1, True
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self.terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    @contextmanager
    def terminal_may_close(self) -> Iterator[None]:
        """Take a write to a closed terminal, which may come before the signal, as a hang-up."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.hang_up()
