"""Conversations are kept as they go: nothing that was on the screen is lost."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.child_path import python_path
from fixtures.documents import write_pdf
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.videos import make_video

import internvl3_mlx
from internvl3_mlx import load
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.past_chats import find_past_chat, list_past_chats, new_log
from internvl3_mlx.cli.slash_commands import handle_line
from internvl3_mlx.generation.conversation_log import (
    ConversationLog,
    list_logs,
    log_folder,
    read_log,
)

ROOT = Path(internvl3_mlx.__file__).parents[1]
MODEL = str(tiny(Recipe()).folder)


@pytest.fixture(scope="module")
def vlm():
    return load(MODEL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    random_image(130, 70).save(tmp_path / "cat.png")
    return tmp_path


@pytest.fixture
def open_session(vlm):
    sessions = []

    def start(keep_images=False):
        session = ChatSession(vlm.conversation(max_tokens=4))
        session.log = new_log(session.conversation, {"model": MODEL}, keep_images=keep_images)
        sessions.append(session)
        return session

    yield start
    for session in sessions:
        if session.log is not None:
            session.log.close()


def ask(session, *lines):
    for line in lines:
        handle_line(session, line)


def state(session):
    return [(e.question, e.answer, e.token_ids) for e in session.conversation.exchanges]


def test_a_conversation_continues_as_if_it_had_never_ended(open_session, vlm):
    first = open_session()
    ask(first, "cat.png What is it?", "Why?", "/undo", "/system Be brief.", "How?")
    first.log.close()
    second = open_session()
    ask(second, "/history 1")
    assert state(second) == state(first)
    assert second.conversation.generation_config.system == "Be brief."
    first.log = None  # it was closed
    for session in (first, second):
        ask(session, "And now?")
    assert state(second) == state(first)
    assert len(list_logs()) == 1


def test_only_the_owner_can_read_it_and_images_are_not_copied(open_session):
    ask(open_session(), "cat.png What is it?")
    (path,) = list_logs()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log_folder().stat().st_mode) == 0o700
    assert [entry.name for entry in log_folder().iterdir()] == [path.name]
    assert path.stat().st_size < 4000


def test_an_image_that_has_changed_is_named_and_the_conversation_continues(
    open_session, folder, capsys
):
    first = open_session()
    ask(first, "cat.png What is it?")
    first.log.close()
    random_image(130, 70, 5).save(folder / "cat.png")
    second = open_session()
    ask(second, "/history 1")
    assert "cat.png is missing or has changed" in capsys.readouterr().err
    assert second.conversation.images == ()
    ask(second, "And now?")
    assert len(second.conversation.exchanges) == 2


def test_copied_images_outlive_the_file(open_session, folder, capsys):
    first = open_session(keep_images=True)
    ask(first, "cat.png What is it?")
    first.log.close()
    (folder / "cat.png").unlink()
    second = open_session(keep_images=True)
    ask(second, "/history 1")
    assert [info.width for info in second.conversation.images] == [130]
    assert "missing" not in capsys.readouterr().err
    (copy,) = (log_folder() / "images").iterdir()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_copied_pages_and_frames_outlive_their_files(open_session, folder, capsys):
    write_pdf(folder / "report.pdf", (100, 200), (100, 150))
    (folder / "walk.mp4").write_bytes(make_video(count=12))
    first = open_session(keep_images=True)
    ask(first, "/set num-frames 3", "/set max-tiles 1", "report.pdf What is it?", "walk.mp4 And?")
    first.log.close()
    for name in ("report.pdf", "walk.mp4"):
        (folder / name).unlink()
    second = open_session(keep_images=True)
    ask(second, "/history 1")
    assert "missing" not in capsys.readouterr().err
    then, now = (session.conversation.exchanges for session in (first, second))
    assert [len(video.frames) for video in now[1].videos] == [3]
    assert now[1].videos[0].times == then[1].videos[0].times
    for old, new in zip(then, now, strict=True):
        pairs = zip(old.processed_images, new.processed_images, strict=True)
        assert all(a.info == b.info and a.content_hash == b.content_hash for a, b in pairs)
    first.log = None
    for session in (first, second):
        ask(session, "And now?")
    assert state(second) == state(first)


def test_a_video_without_its_copies_is_read_again(open_session, folder):
    (folder / "walk.mp4").write_bytes(make_video(count=12))
    first = open_session()
    ask(first, "/set num-frames 3", "walk.mp4 What?")
    first.log.close()
    second = open_session()
    ask(second, "/history 1")
    assert state(second) == state(first)
    assert [len(exchange.videos) for exchange in second.conversation.exchanges] == [1]


def test_pages_are_read_again(open_session, folder):
    write_pdf(folder / "report.pdf", (100, 200), (100, 150))
    first = open_session()
    ask(first, "/set max-tiles 1", "report.pdf What is it?")
    first.log.close()
    second = open_session()
    ask(second, "/history 1")
    assert [info.source for info in second.conversation.images] == [
        "report.pdf page 1",
        "report.pdf page 2",
    ]


def test_clear_begins_another_conversation(open_session):
    session = open_session()
    ask(session, "One?", "/clear", "Two?")
    assert [row["first question"] for row in list_past_chats()] == ["Two?", "One?"]
    assert [row["questions"] for row in list_past_chats()] == [1, 1]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_a_record_costs_at_most_itself(open_session, cut):
    first = open_session()
    ask(first, "One?", "Two?")
    first.log.close()
    (path,) = list_logs()
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    past = read_log(path)
    assert [record["question"] for record in past.exchanges][:1] == ["One?"]
    second = open_session()
    ask(second, "/history 1", "Three?")
    second.log.close()
    assert read_log(path).exchanges[-1]["question"] == "Three?"


def test_a_conversation_that_is_open_elsewhere_is_refused(open_session, capsys):
    ask(open_session(), "One?")
    second = open_session()
    ask(second, "/history 1")
    assert "is open in another chat; leave that one first" in capsys.readouterr().err
    assert second.conversation.exchanges == []


def test_a_log_that_cannot_be_written_is_one_note(open_session, folder, capsys):
    (folder / "data").write_text("a file in the way")
    session = open_session()
    ask(session, "One?", "Two?")
    shown = capsys.readouterr().err
    assert shown.count("this conversation is no longer kept") == 1
    assert len(session.conversation.exchanges) == 2


def run_chat(*words, text=""):
    command = [sys.executable, "-m", "internvl3_mlx", "chat", "--model", MODEL, *words]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_chat_that_is_killed_in_mid_answer_keeps_what_it_had_written(number):
    chat = run_chat("-m", "4000")
    chat.stdin.write("One?\n")
    chat.stdin.flush()
    written = chat.stdout.read(30)
    chat.send_signal(number)
    chat.wait()
    chat.stdin.close()
    chat.stdout.close()
    (record,) = find_past_chat(1).exchanges
    assert record["question"] == "One?"
    assert record["answer"].strip().startswith(written.strip())
    assert record["complete"] is False


def test_continue_takes_the_last_conversation_and_no_history_keeps_none():
    for words, text in (
        ((), "One?\n"),
        (("--no-history",), "Secret?\n"),
        (("--continue",), "Two?\n"),
    ):
        chat = run_chat("-m", "3", *words)
        chat.communicate(text)
        assert chat.returncode == 0
    (row,) = list_past_chats()
    assert (row["first question"], row["questions"]) == ("One?", 2)
    assert "Secret" not in "".join(path.read_text() for path in list_logs())


def test_the_command_lists_and_clears(open_session):
    ask(open_session(), "cat.png What is it?")
    runner = CliRunner()
    assert "What is it?" in runner.invoke(main, ["history"]).stdout
    (row,) = json.loads(runner.invoke(main, ["history", "--json"]).stdout)
    assert row["first question"] == "What is it?"
    refused = runner.invoke(main, ["history", "--clear"])
    assert refused.exit_code == 2
    assert "pass --yes to confirm" in refused.stderr
    assert runner.invoke(main, ["history", "--clear", "--yes"]).exit_code == 0
    assert list_logs() == []
    assert "no past conversations" in runner.invoke(main, ["history"]).stderr
    assert "no past conversations" in runner.invoke(main, ["chat", "--continue"]).stderr


@pytest.mark.parametrize("lines", ["What is it?\n", "/nonsense\n", ""])
def test_the_log_is_closed_however_a_chat_ends(monkeypatch, lines):
    opened, start = [], ConversationLog.open

    def record(log):
        opened.append(log)
        start(log)

    monkeypatch.setattr(ConversationLog, "open", record)
    monkeypatch.setattr(ChatSession, "stream_answer", lambda *_, **__: 1 / 0)
    CliRunner().invoke(main, ["chat", "--model", MODEL], input=lines)
    assert len(opened) == lines.startswith("What")
    assert all(log.stream is None for log in opened)
