"""Whatever is typed into a chat costs at most one line, and the next question is answered."""

import os
import socket

import pytest
from fixtures.inputs import random_image
from PIL import Image

from internvl3_mlx import load
from internvl3_mlx.cli import line_reader
from internvl3_mlx.cli.chat import run_chat
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.slash_commands import handle_line

LINES = {
    # options: each value is what the flag takes, or is refused at once
    "/set max-tokens 10.5": "max-tokens cannot be 10.5; expected a whole number",
    "/set max-tokens -5": "max_tokens is -5; choose 1 to 1,000,000,000",
    "/set max-tokens 99999999999999999999": "choose 1 to 1,000,000,000",
    "/set seed 2.5": "seed cannot be 2.5; expected a whole number",
    "/set seed -1": "seed is -1; choose 0 to",
    "/set temp nan": "temperature is nan; choose 0 to 100",
    "/set temp 1e400": "temp cannot be 1e400; expected a number",
    "/set top-p 2": "top_p is 2.0; choose 0 to 1",
    "/set kv-bits 3": "kv-bits cannot be 3; choose from 4, 8",
    "/set max-tiles 0": "max_tiles is 0; choose 1 to 4,096",
    "/set lookup yes please": "lookup cannot be yes please; expected on or off",
    "/set v2pe-delta 7/0": "V2PE step 7/0 is unknown",
    "/set draft 5": "did you mean draft-model?",
    "/set draft-model ./nodir": "nodir",
    "/set json-schema /dev/zero": "/dev/zero is not a regular file; name a text file",
    "/set json-schema cat.png": "cat.png is not valid JSON",
    "/set json-schema ~nosuch/x": "cannot read ~nosuch/x: No such file or directory",
    '/set regex ""': "regex is empty; /set regex default restores the default",
    "/set = =": "unknown option '='; /set alone lists all",
    "/set \x1b[31m 1": "unknown option '\\x1b[31m'",
    # models
    "/model ./empty": "no weights in empty",
    "/model ./cat.png": "cat.png is a file; name the folder",
    "/model ~nosuch/x": "no model folder, size or repository '~nosuch/x'",
    # files of conversations
    "/load bad.zip": "cannot read bad.zip: it is damaged or not a saved conversation",
    "/load cat.png": "cannot read cat.png: it is damaged or not a saved conversation",
    "/load empty": "empty is not a regular file",
    "/load pipe.png": "pipe.png is not a regular file",
    "/load /dev/zero": "/dev/zero is not a regular file",
    "/load nofile": "no file at nofile; check the path",
    '/load ""': "the file name is empty; name a file",
    "/save cat.png": "cat.png exists and is not a saved conversation; name another file",
    "/save empty": "empty is a folder; name a file",
    "/save /dev/null": "/dev/null is not a regular file; name another file",
    "/save nowhere/x.zip": "cannot write",
    "/save ''": "the file name is empty; name a file",
    "/save a.zip b.zip": "expected one file name, got a.zip b.zip",
    # images
    "/image empty": "cannot read empty: it is a folder; name an image in it",
    "/image pipe.png": "cannot read pipe.png: it is a pipe or a device",
    "/image socket.png": "cannot read socket.png: it is a pipe or a device",
    "/image loop.png": "no file at loop.png",
    "/image /dev/zero": "cannot read /dev/zero: it is a pipe or a device",
    "/image hollow.png": "cannot read hollow.png: it is empty",
    "/image huge.png": "cannot read huge.png: a side of 300,000 pixels is longer than 262,144",
    "/image nofile.png": "no file at nofile.png: check the path",
    '/image "unclosed': 'no file at "unclosed: check the path',
    "/image ftp://x/y.png": "ftp URLs are not supported",
    "/image data:image/png;base64,AAAA": "its image format is unknown",
    "/image ~nosuch/x.png": "no file at ~nosuch/x.png",
    "nofile.png What is it?": "no file at nofile.png",
    # the conversation
    "/drop 0": "no image 0",
    "/drop -1": "/drop needs a number from /images, not -1",
    "/drop 999999999999999999999": "no image 999999999999999999999",
    "/forget 0": "cannot remove 0 of the questions; choose from 1 to 1",
    "/forget x": "/forget needs a number of questions, not x",
    "/history 99": "no past conversations",
    "/edit": "/edit opens an editor, which needs a terminal",
    "/unknown": "no such command or image: /unknown",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVL3_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    random_image(60, 50).save("cat.png")
    Image.new("1", (300_000, 1)).save("huge.png")
    (tmp_path / "bad.zip").write_bytes(b"x")
    (tmp_path / "hollow.png").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        yield tmp_path


@pytest.fixture
def session(vlm, place):
    return ChatSession(vlm.conversation(max_tokens=2), load_model=load, quiet=True)


def test_no_line_costs_more_than_itself(session, place, capsys):
    handle_line(session, "One?")
    before = session.conversation.exchanges, session.conversation.generation_config
    for number, (line, said) in enumerate(LINES.items(), start=1):
        capsys.readouterr()
        handle_line(session, line)
        shown = capsys.readouterr().err
        assert said in shown, line
        assert shown.count("\n") == 1, shown
        assert "\x1b" not in shown
        assert session.num_failed == number, line
        assert (session.conversation.exchanges, session.conversation.generation_config) == before
    handle_line(session, "Still there?")
    assert len(session.conversation.exchanges) == 2
    left = {"cat.png", "huge.png", "bad.zip", "hollow.png", "empty", "loop.png", "pipe.png"}
    assert {*os.listdir(place)} == left | {"socket.png"}


@pytest.mark.parametrize("value", ["1", "[1]", "{a: 1}", "x,y", "7"])
@pytest.mark.parametrize("name", ["stop", "system"])
def test_text_is_text_whatever_it_looks_like(session, name, value):
    handle_line(session, f"/set {name} {value}")
    handle_line(session, "One?")
    assert session.num_failed == 0
    assert getattr(session.conversation.generation_config, name) in (value, (value,))


def test_a_file_that_vanishes_between_two_looks_is_one_line(session, capsys, monkeypatch):
    from internvl3_mlx.cli import chat_session

    read_media = chat_session.read_media

    def vanish(media, **options):
        os.unlink("cat.png")
        return read_media(media, **options)

    monkeypatch.setattr(chat_session, "read_media", vanish)
    handle_line(session, "cat.png What is it?")
    assert "error: no file at cat.png" in capsys.readouterr().err
    handle_line(session, "One?")
    assert len(session.conversation.exchanges) == 1


def test_a_line_without_end_is_passed_over(session, capsys, monkeypatch):
    monkeypatch.setattr(line_reader, "MAX_LINE", 100)
    with open("lines.txt", "w") as file:
        file.write("One?\n" + "a" * 5000 + "\nTwo?\n")
    with open("lines.txt") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        run_chat(session)
    assert [past.question for past in session.conversation.exchanges] == ["One?", "Two?"]
    assert session.num_failed == 1
    assert "characters; name files by their paths" in capsys.readouterr().err
