"""One typed or dropped line: each form that terminals and people write."""

import os

import pytest

from internvl3_mlx.cli.input_line import display_path, parse_line

NARROW = "\u202f"  # what macOS puts before AM and PM in the names of screenshots
SCREENSHOT = f"Screenshot 2026-11-23 at 9.41.00{NARROW}AM.png"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with images of every awkward name, which is also the current folder."""
    icloud = tmp_path / "com~apple~CloudDocs"
    icloud.mkdir()
    names = ("My cat.png", "a b.png", "c.webp", "cat.png", SCREENSHOT, "clip.mp4", "report.pdf")
    for path in (*(tmp_path / name for name in names), icloud / "CleanShot at 21.26@2x.png"):
        path.write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "sources", "question"),
    [
        (r"~/My\ cat.png what is this?", ["~/My cat.png"], "what is this?"),
        ("'~/My cat.png' describe", ["~/My cat.png"], "describe"),
        ('"~/a b.png" and ~/c.webp', ["~/a b.png", "~/c.webp"], "and"),
        (
            r"com\~apple\~CloudDocs/CleanShot\ at\ 21.26@2x.png hi",
            ["com~apple~CloudDocs/CleanShot at 21.26@2x.png"],
            "hi",
        ),
        (SCREENSHOT.replace(" ", "\\ ") + " hi", [SCREENSHOT], "hi"),
        ("https://x.org/a.jpg?w=1 hi", ["https://x.org/a.jpg?w=1"], "hi"),
        ("it's a dog, isn't it?", [], "it's a dog, isn't it?"),
        ("what is in cat.png?", ["cat.png"], "what is in cat.png?"),
        ("look at cat.png and tell", ["cat.png"], "look at and tell"),
        ("cat.png", ["cat.png"], ""),
        ("cat.png\twhat?", ["cat.png"], "what?"),
        ("cat.png c.webp", ["cat.png", "c.webp"], ""),
        ("  two  blanks   stay  ", [], "  two  blanks   stay  "),
        ("a \\d+ pattern, a 'quoted word' and \"two\"", [], None),
        ("see https://x.org/page for more", [], None),
        ("the `nowhere.png` of my code", [], None),
        ("1. one\n2. two", [], None),
        ("", [], ""),
    ],
)
def test_words_that_are_images_are_taken_out_and_the_rest_stays(home, typed, sources, question):
    line = parse_line(typed)
    assert [dropped.source for dropped in line.media] == sources
    assert line.question == (typed if question is None else question)
    assert line.problems == ()


def test_a_file_address_is_an_image(home):
    line = parse_line(f"file://{home}/My%20cat.png hi")
    assert len(line.media) == 1
    assert line.question == "hi"


def test_a_screenshot_typed_with_a_plain_blank_is_found(home):
    typed = SCREENSHOT.replace(NARROW, " ").replace(" ", "\\ ")
    assert len(parse_line(f"{typed} hi").media) == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("cat.png", "image"), ("clip.mp4", "video"), ("report.pdf", "document")]
)
def test_the_suffix_says_what_it_is(home, name, kind):
    assert parse_line(name).media[0].kind == kind


@pytest.mark.parametrize("typed", ["~/cta.png what?", "what is 'no such.png' about"])
def test_a_missing_image_is_reported_and_never_sent(home, typed):
    line = parse_line(typed)
    assert line.media == ()
    assert "no file at" in line.problems[0]


def test_a_near_miss_is_named(home):
    assert "did you mean" in parse_line("~/cta.png").problems[0]


def test_a_path_is_shown_as_it_would_be_typed(home, monkeypatch):
    path = os.path.join(home, "My cat.png")
    monkeypatch.chdir(home)
    assert display_path(path) == "My\\ cat.png"
    monkeypatch.chdir("/")
    assert display_path(path) == "~/My\\ cat.png"
    assert parse_line(display_path(path)).media[0].source == "~/My cat.png"
