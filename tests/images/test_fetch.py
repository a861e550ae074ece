"""What people type must be found, or be refused with one line that says what to do."""

import io
import os
import re
import socket
import sys
import unicodedata
from pathlib import Path

import pytest
from fixtures.image_files import encoded, message, noise

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images import fetch
from internvl3_mlx.images.fetch import locate
from internvl3_mlx.images.load import image_size, open_image
from internvl3_mlx.images.pages import open_pages


def test_tilde_is_home_but_an_exact_name_comes_first(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (tmp_path / "~").mkdir()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    noise(3, 4).save(home / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_image("~/a.png").height == 4
    assert open_image(Path("~/a.png")).name == "~/a.png"
    noise(3, 9).save(tmp_path / "~" / "a.png")
    assert open_image("~/a.png").height == 9


@pytest.mark.parametrize(
    ("stored", "typed"),
    [
        ("Screenshot 9.41.00\u202fAM.png", "Screenshot 9.41.00 AM.png"),
        ("a\u00a0b.png", "a b.png"),
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        (
            unicodedata.normalize("NFC", "über 1.png"),
            unicodedata.normalize("NFD", "über\u00a01.png"),
        ),
    ],
)
def test_a_name_that_looks_the_same_is_found(tmp_path, stored, typed):
    noise().save(tmp_path / stored)
    assert open_image(str(tmp_path / typed)).width == 7


def test_two_names_that_look_the_same_are_not_guessed_between(tmp_path):
    for space in ("\u202f", "\u00a0"):
        noise().save(tmp_path / f"a{space}b.png")
    assert "no file at" in message(tmp_path / "a b.png")
    noise(3, 3).save(tmp_path / "a b.png")
    assert open_image(tmp_path / "a b.png").width == 3


def test_what_a_shell_pipes_in_place_of_a_file_is_read():
    reading, writing = os.pipe()
    os.write(writing, encoded(noise()))
    os.close(writing)
    assert open_image(f"/dev/fd/{reading}").width == 7
    os.close(reading)


@pytest.mark.parametrize("read", [open_image, image_size, open_pages])
def test_a_pipe_or_device_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for path in (tmp_path / "pipe.png", tmp_path / "socket.png", Path("/dev/zero")):
            with pytest.raises(ImageError, match="it is a pipe or a device; give the path of"):
                read(str(path))


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path):
    noise().save(tmp_path / "a.png")
    located = locate(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a.png: No such file or directory; check the file"):
        located.open()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png: it is a pipe or a device"):
        located.open()


def test_paths_that_hold_no_picture_are_told(tmp_path):
    noise().save(tmp_path / "kitten.png")
    assert message(tmp_path / "kittem.png").endswith(f"did you mean {tmp_path / 'kitten.png'}?")
    assert message(tmp_path / "other" / "x.png") == (
        f"no file at {tmp_path / 'other' / 'x.png'}: check the path"
    )
    assert message(tmp_path) == f"cannot read {tmp_path}: it is a folder; name an image in it"
    assert message("/dev/null") == (
        "cannot read /dev/null: it is a pipe or a device; give the path of an image, or - to read "
        "standard input"
    )
    (tmp_path / "link.png").symlink_to("gone.png")
    assert message(tmp_path / "link.png").endswith("it is a link to gone.png, which is not there")
    assert message("") == "no file at an empty path: check the path"
    assert "no file at a\\x00b" in message("a\0b")
    assert message("QUJD" * 9000).endswith("if it is base64, put data:;base64, before it")
    assert len(message("QUJD" * 9000)) < 400


def test_an_unreadable_file_is_told(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert message(tmp_path / "a.png").endswith("a.png: Permission denied; check the file")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ftp://x.org/a.png", "ftp URLs are not supported; use http, https, file or data"),
        ("file://nas/a.png", r"the file is on another computer \(nas\); copy it here"),
        ("http://[::1/a.png", "the URL is not valid; check the URL"),
        ("data:image/png;base64", "a data URI needs a comma before its data"),
        ("data:image/png;base64,@@@", "its data is not valid base64; encode the file again"),
        ("data:image/png;base64,QUJDR", "its data is not valid base64; encode the file again"),
        ("data:image/png;base64,", "it is empty"),
        (3.5, "cannot read an image from float; pass a path"),
    ],
)
def test_odd_sources_are_told(source, words):
    assert re.search(words, message(source))


def test_standard_input_without_a_pipe_is_told(monkeypatch):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Terminal()))
    assert message("-").endswith("pipe one in, or give its path")


def test_more_than_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(1001))))
    assert message("-").startswith("cannot read standard input: larger than")
    assert message("data:," + "a" * 2001).startswith("cannot read data:image: larger than")
