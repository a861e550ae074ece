"""The README's conversation is recorded from the program itself."""

import re
from xml.etree import ElementTree as ET

from examples.record_chat.record import draw_screen, main


def test_a_conversation_is_recorded_as_text_and_as_svg(tmp_path):
    main([str(tmp_path / "conversation"), "--max-tokens", "3"])
    text = (tmp_path / "conversation.txt").read_text("utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("╭─ internvl3 chat")
    assert "› dog.jpg What is this?" in lines
    assert any(line.startswith("dog.jpg 448×448 · 5 tiles") for line in lines)
    assert len(re.findall(r"tokens? · .*prompt \d", text)) == text.count("\n›") == 6
    assert "try " not in text
    root = ET.fromstring((tmp_path / "conversation.svg").read_text("utf-8"))
    shown = [row.text for row in root if row.tag.endswith("text")]
    assert shown == [line for line in lines if line]


def test_a_narrow_terminal_has_no_broken_line(tmp_path):
    main([str(tmp_path / "narrow"), "dog.jpg What is this?", "--columns", "40"])
    lines = (tmp_path / "narrow.txt").read_text("utf-8").splitlines()
    assert lines[0].startswith("model  demo")
    assert max(map(len, lines)) <= 40
    assert not any(line.startswith((" ", "╭", "│")) for line in lines)


def test_svg_escapes_what_the_model_says():
    assert "&lt;b&gt;" in draw_screen(["<b>"])
