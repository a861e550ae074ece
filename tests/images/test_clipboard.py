"""A copied file comes before the picture of its icon that the Finder puts beside it."""

import io
import os
import sys

import pytest
from fixtures.image_files import message
from fixtures.inputs import write_video
from PIL import Image, ImageGrab

from internvl3_mlx.cli.input_line import media_source
from internvl3_mlx.images import clipboard
from internvl3_mlx.images.clipboard import copied_file
from internvl3_mlx.images.load import open_image

ICON = (1024, 1024)


@pytest.fixture
def pasteboard(tmp_path, monkeypatch):
    """A Mac whose osascript knows a copied file (or none), and whose image is always the icon."""
    icon = io.BytesIO()
    Image.new("RGBA", ICON, (255, 255, 255, 0)).save(icon, "PNG")
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: Image.open(icon))
    monkeypatch.setattr(clipboard.sys, "platform", "darwin")
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)

    def copy(path):
        (tools / "osascript").write_text(
            "#!/bin/sh\n"
            'case "$*" in\n'
            f"*'clipboard info for «class furl»'*'as «class furl»'*) echo '{path or ''}' ;;\n"
            "*) exit 1 ;;\n"
            "esac\n",
            "utf-8",
        )
        (tools / "osascript").chmod(0o755)

    return copy


def test_a_copied_photo_is_the_photo_and_not_its_icon(pasteboard, tmp_path):
    photo = tmp_path / "my holiday é.png"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(photo)
    pasteboard(photo)
    opened = open_image("clipboard")
    assert (opened.name, opened.image.size) == (str(photo), (300, 200))


def test_a_copied_screenshot_is_the_image(pasteboard):
    pasteboard(None)
    assert open_image("clipboard").image.size == ICON


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.heic", "image"), ("film.mp4", "video"), ("letter.pdf", "document"), ("x.JPG", "image")],
)
def test_every_kind_of_file_can_be_copied(pasteboard, tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"content")
    pasteboard(tmp_path / name)
    media = media_source("clipboard")
    assert (media.source, media.kind) == (str(tmp_path / name), kind)


def test_a_file_that_is_gone_gives_way_to_the_image(pasteboard, tmp_path):
    pasteboard(tmp_path / "gone.png")
    assert open_image("clipboard").image.size == ICON


def test_a_copied_video_says_what_to_do(pasteboard, tmp_path):
    pasteboard(write_video(tmp_path / "film.mp4", frames=2))
    assert "it is a video; ask about it as a video" in message("clipboard")


def test_without_osascript_and_on_other_systems_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(clipboard.sys, "platform", "darwin")
    assert copied_file() is None
    monkeypatch.setattr(clipboard.sys, "platform", "linux")
    monkeypatch.setattr(clipboard.subprocess, "run", None)
    assert copied_file() is None


def test_an_osascript_that_hangs_is_given_up(pasteboard, monkeypatch, tmp_path):
    monkeypatch.setattr(clipboard, "OSASCRIPT", sys.executable)
    monkeypatch.setattr(clipboard, "COPIED_FILE", ("import time; time.sleep(60)",))
    monkeypatch.setattr(clipboard, "TIMEOUT_S", 0.2)
    run = clipboard.subprocess.run
    as_python = lambda words, **o: run([words[0], "-c", words[2]], **o)  # noqa: E731
    monkeypatch.setattr(clipboard.subprocess, "run", as_python)
    assert copied_file() is None
