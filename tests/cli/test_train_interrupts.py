"""Signals while ``internvl3 train`` runs, without a terminal."""

import os
import signal

import pytest

from internvl3_mlx.cli.train_interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_to_stop_after_the_update(monkeypatch, number):
    monkeypatch.setattr(os, "isatty", lambda _: False)
    interrupts = Interrupts()
    with interrupts.catch():
        assert not interrupts.received()
        os.kill(os.getpid(), number)
        assert interrupts.received()
    assert interrupts.hung_up == (number == signal.SIGHUP)
