"""Nothing that we did not write is replaced, and of two writers at once one is first."""

import os
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
from fixtures.mac_disk import ignore_spelling

from internvl3_mlx import files
from internvl3_mlx.errors import WriteError
from internvl3_mlx.files import atomic_folder
from internvl3_mlx.write_guards import (
    FolderKind,
    check_replaceable_file,
    check_replaceable_folder,
    contains,
    hold_lock,
    starts_with,
)


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model-00001-of-00002.safetensors", "LICENSE.txt", ".DS_Store"):
        (folder / name).write_text(name)
    return folder


def test_a_model_and_an_empty_folder_may_be_replaced(tmp_path):
    check_replaceable_folder(make_model(tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    check_replaceable_folder(tmp_path / "empty")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (adapter / name).write_text("x")
    check_replaceable_folder(adapter)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["thesis.txt"], r"holds files that are not part of a model: thesis\.txt; move them away"),
        (["a.txt", "b.txt", "c.txt", "d.json"], r"a\.txt, b\.txt, c\.txt and 1 more"),
        (["photos/"], "photos/"),
        (["my_config.json"], "my_config.json"),
        (["my.safetensors"], "my.safetensors"),
    ],
)
def test_a_foreign_file_in_a_model_folder_is_named_and_stays(tmp_path, extra, named):
    model = make_model(tmp_path / "model")
    for name in extra:
        (model / name).mkdir() if name.endswith("/") else (model / name).write_text("mine")
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(WriteError, match=named), atomic_folder(model, overwrite=True):
        pass
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_folder_without_a_whole_model_stays(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(
        WriteError, match=r"holds README\.md but not the whole of a model; remove it"
    ):
        check_replaceable_folder(tmp_path)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("home/u", "your home folder"),
        ("home", "your home folder or a parent"),
        ("work", "the current folder or a parent"),
        ("work/here", "the current folder"),
        ("repo", "a git work tree"),
    ],
)
def test_places_of_the_user_are_never_replaced(tmp_path, monkeypatch, place, why):
    for folder in ("home/u", "work/here", "repo/.git"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home/u"))
    monkeypatch.chdir(tmp_path / "work/here")
    with pytest.raises(WriteError, match=f"{why}.*never replaced; name another folder"):
        check_replaceable_folder(tmp_path / place)


def test_a_mount_point_is_never_replaced():
    with pytest.raises(WriteError, match="/ is .*never replaced"):
        check_replaceable_folder(Path("/"))


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    path = tmp_path / "photo.jpg"

    def is_ours(file: Path) -> bool:
        return starts_with(file, b"PK", b"ours")

    check_replaceable_file(path, is_ours, "a saved conversation")
    for content in (b"", b"PK\x03\x04", b"ours!"):
        path.write_bytes(content)
        check_replaceable_file(path, is_ours, "a saved conversation")
    path.write_bytes(b"\xff\xd8")
    with pytest.raises(WriteError, match=r"jpg exists and is not a saved conversation; name an"):
        check_replaceable_file(path, is_ours, "a saved conversation")


ANYTHING = FolderKind("anything", ("*",), ((),))
WRITER = """
import sys, pathlib
from internvl3_mlx.files import atomic_folder
with atomic_folder(pathlib.Path(sys.argv[1])) as part:
    print("writing", flush=True)
    sys.stdin.read()
    (part / "config.json").write_text(sys.argv[2])
"""


@pytest.fixture
def start_writer():
    """Start processes that write a folder until their input is closed."""
    running = []

    def start(target, content):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target), content],
            cwd=Path(files.__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        running.append(process)
        assert process.stdout.readline() == b"writing\n"
        return process

    yield start
    for process in running:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def write(target, content, on_wait, **options):
    with atomic_folder(target, on_wait=on_wait, **options) as part:
        (part / "config.json").write_text(content)


def test_a_target_that_another_process_writes_is_waited_for(start_writer, tmp_path):
    target, said = tmp_path / "out", []
    other = start_writer(target, "same")

    def go_on(message):
        said.append(message)
        other.stdin.close()

    write(target, "same", go_on)
    assert said == [f"another process is writing {target}; waiting for it"]
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "same"


def test_what_another_process_has_just_written_is_not_replaced(start_writer, tmp_path):
    target = tmp_path / "out"
    other = start_writer(target, "theirs")
    with pytest.raises(WriteError, match="out exists; name another folder, or pass --overwrite"):
        write(target, "ours", lambda _: other.stdin.close())
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "theirs"


def test_with_overwrite_the_second_of_two_writers_replaces_the_first(start_writer, tmp_path):
    target = tmp_path / "out"
    other = start_writer(target, "theirs")
    options = {"overwrite": True, "replaceable": ANYTHING}
    write(target, "ours", lambda _: other.stdin.close(), **options)
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "ours"


def test_a_writer_that_is_killed_while_another_waits_leaves_nothing(start_writer, tmp_path):
    target = tmp_path / "out"
    other = start_writer(target, "theirs")

    def kill(_):
        other.kill()
        other.wait()

    write(target, "ours", kill)
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "ours"


def test_a_process_does_not_wait_for_itself(tmp_path):
    target = tmp_path / "out"
    with (
        atomic_folder(target),
        pytest.raises(WriteError, match="out is being written already"),
        atomic_folder(target),
    ):
        pass


def test_a_lock_is_waited_for_with_one_call(tmp_path):
    waited, order = threading.Event(), []

    def second() -> None:
        with hold_lock(tmp_path / "cache" / ".lock", waited.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with hold_lock(tmp_path / "cache" / ".lock", lambda: order.append("waited")):
        thread.start()
        assert waited.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


@pytest.mark.parametrize("other", ["internvl3-demo", "INTERNVL3-Demo", "InternVL3-Demo"])
def test_a_folder_is_known_by_every_spelling_of_a_macs_disk(tmp_path, monkeypatch, other):
    folder = tmp_path / "InternVL3-Demo"
    (folder / "in").mkdir(parents=True)
    ignore_spelling(monkeypatch, tmp_path)
    assert contains(folder, tmp_path / other)
    assert contains(folder, tmp_path / other / "IN" / "new")
    assert contains(tmp_path / other, folder / "in")
    assert not contains(folder, tmp_path)
    assert not contains(tmp_path / "nowhere", folder)


def test_both_unicode_forms_of_a_name_are_one_folder(tmp_path, monkeypatch):
    one, other = (unicodedata.normalize(form, "Modèle") for form in ("NFC", "NFD"))
    (tmp_path / one).mkdir()
    ignore_spelling(monkeypatch, tmp_path)
    assert contains(tmp_path / one, tmp_path / other)


def test_the_current_folder_is_never_replaced_whatever_its_spelling(tmp_path, monkeypatch):
    (tmp_path / "Work" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Work" / "inside")
    ignore_spelling(monkeypatch, tmp_path)
    with pytest.raises(WriteError, match="the current folder or a parent of it"):
        check_replaceable_folder(tmp_path / "work")
