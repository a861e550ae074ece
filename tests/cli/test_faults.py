"""The last door of the chat, of --each and of batches: a fault is one line, the work goes on."""

import errno
import json

import pytest
from click.testing import CliRunner
from fixtures.faults import ALONE, BATCHED, STAGES, PanicException, fault_at
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.faults import describe_fault
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.slash_commands import COMMANDS, handle_line

SHOWN = {  # stages of the chat itself
    "read the line": ("internvl3_mlx.cli.chat_session", "parse_line"),
    "open the file": ("internvl3_mlx.cli.chat_session", "read_media"),
    "make a writer": ("internvl3_mlx.cli.chat_session", "make_answer_writer"),
    "write the answer": ("internvl3_mlx.cli.chat_session", "PlainWriter.add"),
    "end the answer": ("internvl3_mlx.cli.chat_session", "PlainWriter.finish"),
    "show statistics": ("internvl3_mlx.cli.chat_session", "ChatSession.show_stats"),
}
CHAT = {**STAGES, **ALONE, **SHOWN}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        random_image(60 + 40 * number, 60, number).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, PanicException])
@pytest.mark.parametrize("stage", CHAT)
def test_a_fault_in_the_chat_is_one_line_and_the_next_question_is_answered(
    vlm, folder, capsys, stage, fault
):
    session = ChatSession(vlm.conversation(max_tokens=3))
    with fault_at(CHAT[stage], fault):
        handle_line(session, "a.png What is it?")
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert line == f"error: {fault.__name__}: unforeseen; the conversation is unharmed"
    assert session.num_failed == 1
    handle_line(session, "a.png And now?")
    assert session.conversation.exchanges[-1].question == "And now?"
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_fault_in_a_command_ends_no_chat(vlm, capsys, monkeypatch, command):
    session = ChatSession(vlm.conversation(max_tokens=3))

    def fail(*_):
        raise PanicException("rust")

    broken = type(command)(command.name, command.help, fail)
    monkeypatch.setitem(
        __import__("internvl3_mlx.cli.slash_commands", fromlist=["x"]).COMMANDS_BY_NAME,
        command.name,
        broken,
    )
    handle_line(session, f"{command.name} 1")
    assert "error: PanicException: rust; the conversation is unharmed" in capsys.readouterr().err
    assert not session.is_finished


def each(folder, *words):
    sources = [str(path) for path in sorted(folder.glob("*.png"))]
    model = str(tiny(Recipe()).folder)
    words = ["generate", *sources, "-p", "What?", "--each", "--jsonl", "--model", model, *words]
    result = CliRunner().invoke(main, [*words, "-m", "3"])
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("fault", [ZeroDivisionError, PanicException])
@pytest.mark.parametrize("stage", {**STAGES, **ALONE})
def test_a_fault_costs_one_image_of_each(folder, stage, fault):
    _, expected = each(folder)
    with fault_at({**STAGES, **ALONE}[stage], fault, once=True):
        code, lines = each(folder)
    assert code == 1
    assert lines[0]["error"] == f"{fault.__name__}: unforeseen"
    assert [line["text"] for line in lines[1:]] == [line["text"] for line in expected[1:]]


@pytest.mark.parametrize("fault", [ZeroDivisionError, PanicException])
@pytest.mark.parametrize("stage", {**STAGES, **BATCHED})
def test_a_fault_in_a_batch_costs_at_most_one_image(folder, stage, fault):
    _, expected = each(folder)
    with fault_at({**STAGES, **BATCHED}[stage], fault, once=True):
        code, lines = each(folder, "--batch-size", "3")
    failed = [line for line in lines if "error" in line]
    assert len(failed) <= 1
    assert code == bool(failed)
    for line, wanted in zip(lines, expected, strict=True):
        assert line["source"] == wanted["source"]
        assert line in failed or line["text"] == wanted["text"]


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, PanicException])
@pytest.mark.parametrize("stage", ["tile the image", "open the prefill", "detokenize"])
def test_a_fault_in_samples_is_one_line_and_the_next_run_answers(folder, stage, fault):
    words = ["generate", "a.png", "-p", "What?", "--num-samples", "2", "--quiet", "-m", "3"]
    words += ["--model", str(tiny(Recipe()).folder)]
    with fault_at(STAGES[stage], fault):
        failed = CliRunner().invoke(main, words)
    assert failed.exit_code == 1
    assert failed.stderr.startswith(f"error: {fault.__name__}: unforeseen (run again with --debug")
    assert failed.stderr.count("\n") == 1
    assert CliRunner().invoke(main, words).exit_code == 0


def test_a_full_disk_is_called_that():
    full = "cannot write the output: no space left on the disk; free some and run again"
    assert describe_fault(OSError(errno.ENOSPC, "No space left on device")) == full
    assert describe_fault(RuntimeError("[write] Unable to write 8 bytes to file.")) == full
