"""YAML is read within bounds; what cannot be used is named in one line."""

import os

import pytest

from internvl3_mlx.convert.recipes import read_recipe
from internvl3_mlx.errors import UserError
from internvl3_mlx.yaml_files import read_yaml

BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*r.yaml: No such file or directory; check the path"),
        (b"a: [", "r.yaml is not valid YAML: while parsing"),
        (b"\xff\xfe\x00", "r.yaml is not valid YAML"),
        (b"- a", "r.yaml is not a YAML mapping; expected keys such as text"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(tmp_path / "r.yaml", "keys such as text")
    assert "\n" not in str(caught.value)


def test_a_yaml_mapping_is_read(tmp_path):
    (tmp_path / "r.yaml").write_text("text: 4\nmodules: {lm_head: 6}\n")
    assert read_yaml(tmp_path / "r.yaml", "keys") == {"text": 4, "modules": {"lm_head": 6}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text: 2001-13-45", "not valid YAML: month must be in 1..12"),
        ("text: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("text: " + "[" * 20_000, "not valid YAML: maximum recursion depth exceeded"),
        ("text: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a con"),
        (BOMB, "stands for more than 100,000 values; write it without &"),
        ("a: &a [*a]", "stands for more than 100,000 values; write it without &"),
        ("#" * 2**20 + "\ntext: 4", "is larger than 1,048,576 bytes; name another file"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    for read in (lambda path: read_yaml(path, "keys"), read_recipe):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / "r.yaml")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(UserError, match=r"r.yaml is not a regular file; name a text file"):
        read_yaml(tmp_path / "r.yaml", "keys")


def test_an_alias_that_repeats_a_value_is_fine(tmp_path):
    (tmp_path / "r.yaml").write_text("text: &four {bits: 4}\nmodules: {lm_head: *four}\n")
    assert read_recipe(tmp_path / "r.yaml").text.bits == 4


@pytest.mark.parametrize("patterns", [["*a" * 150], [f"layers.{n}" for n in range(1001)]])
def test_the_patterns_of_a_recipe_have_a_bound(tmp_path, patterns):
    lines = "".join(f'  "{pattern}": 4\n' for pattern in patterns)
    (tmp_path / "r.yaml").write_text(f"text: 4\nmodules:\n{lines}")
    with pytest.raises(UserError, match="more than 1,000 patterns, or one of more than 200 char"):
        read_recipe(tmp_path / "r.yaml")


def test_many_stars_are_matched_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text(f'text: 4\nmodules:\n  "{"*a" * 90}*X": 6\n')
    assert read_recipe(tmp_path / "r.yaml").choose("a" * 200).bits == 4
