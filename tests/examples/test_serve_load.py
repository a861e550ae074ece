"""The load recipe on a small scale: every client gets its own answer."""

from examples.serve_load.run import main


def test_clients_at_once_each_get_their_own_answer(capsys):
    assert main(["--clients", "6", "--requests", "18", "--sample-seconds", "0.2"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["requests"].strip() == "18"
    assert lines["outcomes"].strip() == "18 right"
