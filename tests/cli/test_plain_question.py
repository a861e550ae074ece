"""The question of generate may be plain words after the images, or before them."""

import pytest

from internvl3_mlx.cli.generate import split_question


@pytest.mark.parametrize(
    ("words", "images", "question"),
    [
        (["here.jpg", "What is this?"], ["here.jpg"], "What is this?"),
        (["here.jpg", "What", "is", "this?"], ["here.jpg"], "What is this?"),
        (["here.jpg", "hi"], ["here.jpg"], "hi"),
        (["here.jpg", "gone.png"], ["here.jpg", "gone.png"], None),
        (["here.jpg", "folder/gone"], ["here.jpg", "folder/gone"], None),
        (["here.jpg", "Is it a cat/dog?"], ["here.jpg"], "Is it a cat/dog?"),
        (["Hello there"], [], "Hello there"),
        (["https://x.org/a", "-", "clipboard"], ["https://x.org/a", "-", "clipboard"], None),
        (["data:image/png,x", "Read."], ["data:image/png,x"], "Read."),
        (["plain", "words", "here.jpg"], ["here.jpg"], "plain words"),
        (["one", "here.jpg", "two"], ["one", "here.jpg"], "two"),
        ([], [], None),
    ],
)
def test_trailing_words_that_are_no_file_are_the_question(
    tmp_path, monkeypatch, words, images, question
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jpg").write_bytes(b"x")
    assert split_question(words) == (tuple(images), question)
