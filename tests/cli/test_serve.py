"""``internvl3 serve``: flags, addresses, the key, the agent for launchd, and an end in order."""

import os
import plistlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from click.testing import CliRunner

from internvl3_mlx.cli import launchd, serve
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.qr_code import qr_lines
from internvl3_mlx.errors import GPUError, UserError, WriteError

URL = "http://192.168.1.23:8080/#key=abcdefghijklmnop"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-auth", "--api-key", "x"], "--no-auth and a key contradict each other"),
        (["--api-key", "two words"], "the key has characters that HTTP cannot send"),
        (["--max-body-mb", "0"], "max_body_mb is 0; it must be at least 1"),
        (["--add-model", "ocr", "--model", "demo"], "--add-model is 'ocr'; give it as NAME=VALUE"),
        (["--add-adapter", "a:b=c", "--model", "demo"], "NAME without a colon"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--max-batch", "0", "--model", "demo"], "max_batch is 0; it must be at least 1"),
        (["--kv-bits", "5", "--model", "demo"], "'5' is not one of '4', '8'"),
        (["-p", "80"], "did you mean --port?"),
    ],
)
def test_a_mistake_is_told_before_a_model_loads(arguments, message):
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda _: None)
    result = CliRunner().invoke(main, ["serve", "--model", "demo"])
    assert result.exit_code == 2
    assert "internvl3 serve needs starlette uvicorn pydantic" in " ".join(result.output.split())


def test_a_port_that_is_taken():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--model", "demo", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.output


def test_a_model_that_is_not_there_ends_the_server():
    arguments = ["serve", "--model", "/nowhere/at/all", "--port", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "/nowhere/at/all" in result.output


@pytest.mark.parametrize(
    ("host", "given", "no_auth", "expected"),
    [
        ("127.0.0.1", None, False, None),
        ("::1", None, False, None),
        ("127.0.0.1", "k", False, "k"),
        ("0.0.0.0", "k", False, "k"),
        ("0.0.0.0", None, True, None),
    ],
)
def test_which_key_is_needed(host, given, no_auth, expected):
    assert serve.choose_key(host, given, no_auth=no_auth) == expected


def test_other_machines_need_a_key_that_is_made_up():
    keys = {serve.choose_key("0.0.0.0", None, no_auth=False) for _ in range(5)}
    assert len(keys) == 5
    assert all(len(key) >= 20 for key in keys)


def test_the_qr_code_holds_the_address():
    lines = qr_lines(URL)
    assert len({len(line) for line in lines}) == 1
    assert set("".join(lines)) <= set("█▀▄ ")
    segno = pytest.importorskip("segno")
    modules = [[int(bool(m)) for m in row] for row in segno.make(URL, error="l").matrix]
    dark = {"█": (0, 0), "▀": (0, 1), "▄": (1, 0), " ": (1, 1)}
    read = [[dark[c][half] for c in line] for line in lines for half in (0, 1)]
    size = len(modules)
    assert [row[2 : 2 + size] for row in read[2 : 2 + size]] == modules


def test_the_addresses_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(serve, "own_address", lambda: "192.168.1.23")
    monkeypatch.setattr(serve.console, "is_interactive", lambda _: True)
    monkeypatch.setenv("NO_COLOR", "1")
    serve.show_addresses("0.0.0.0", 8080, "abc")
    shown = capsys.readouterr().err
    assert "http://192.168.1.23:8080/#key=abc" in shown
    assert "http://192.168.1.23:8080/v1" in shown
    assert {line.index("http") for line in shown.splitlines() if "http" in line} == {19}
    assert "█" in shown
    serve.show_addresses("127.0.0.1", 8080, None)
    shown = capsys.readouterr().err
    assert "http://127.0.0.1:8080" in shown
    assert "█" not in shown
    assert "key" not in shown


@pytest.fixture
def mac(monkeypatch, tmp_path):
    monkeypatch.setattr(launchd, "is_mac", lambda: True)
    return tmp_path


def test_the_agent_is_written_for_its_user_alone(mac):
    path = launchd.install_agent(["--model", "2b", "--port", "9000"], "s3cret", mac)
    assert path == mac / "Library" / "LaunchAgents" / "internvl3-mlx.serve.plist"
    assert path.stat().st_mode & 0o777 == 0o600
    agent = plistlib.loads(path.read_bytes())
    assert agent["ProgramArguments"] == [
        sys.executable, "-m", "internvl3_mlx", "serve", "--model", "2b", "--port", "9000",
    ]  # fmt: skip
    assert agent["EnvironmentVariables"]["INTERNVL3_API_KEY"] == "s3cret"
    assert "s3cret" not in agent["ProgramArguments"]
    lines = "\n".join(launchd.describe_agent(path))
    assert f"launchctl bootstrap gui/{os.getuid()} {path}" in lines
    assert f"launchctl bootout gui/{os.getuid()}/internvl3-mlx.serve; rm {path}" in lines


def test_an_agent_of_ours_is_replaced_and_no_other(mac):
    path = launchd.install_agent([], None, mac)
    launchd.install_agent(["--port", "1"], None, mac)
    path.write_bytes(plistlib.dumps({"Label": "com.example.other"}))
    with pytest.raises(WriteError, match="is not a file of internvl3 serve"):
        launchd.install_agent([], None, mac)
    path.write_text("nonsense")
    with pytest.raises(WriteError, match="is not a file of internvl3 serve"):
        launchd.install_agent([], None, mac)


def test_there_is_no_launchd_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(launchd, "is_mac", lambda: False)
    with pytest.raises(UserError, match="launchd, which only macOS has"):
        launchd.install_agent([], None, tmp_path)


def test_a_fault_is_named_without_the_words_of_a_request():
    assert serve.describe_failure(GPUError("out of memory")) == "out of memory"
    assert "patient" not in serve.describe_failure(KeyError("the patient's name"))


def test_the_key_is_not_left_on_the_command_line():
    words = ["--model", "2b", "--api-key", "x", "--api-key=y", "--port", "1"]
    assert serve.without_key(words) == ["--model", "2b", "--port", "1"]


def test_sigterm_ends_the_server_with_code_zero(tmp_path):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "internvl3_mlx", "serve", "--model", "demo", "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=os.getcwd()
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"chat page\s+(http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("the server did not say where it is")
        with urllib.request.urlopen(f"{found[1]}/health") as answer:
            assert b'"ok"' in answer.read()
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "stopped" in rest
    assert time.monotonic() - started < 15
