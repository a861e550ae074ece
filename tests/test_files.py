"""Atomic writes survive a kill at any point; caches, YAML, hints and digests have one form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl3_mlx import files
from internvl3_mlx.errors import UserError, WriteError
from internvl3_mlx.files import (
    atomic_files,
    atomic_folder,
    atomic_write,
    cache_folder,
    check_keys,
    content_digest,
    did_you_mean,
    recover_folder,
    remove_partial_files,
)
from internvl3_mlx.write_guards import FolderKind

# Kills itself at the n-th call that touches the disk: before it, or right after it.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from internvl3_mlx import files

target, at, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
calls = 0

def dying(function):
    def call(*given, **named):
        global calls
        calls += 1
        if calls == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*given, **named)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for module, name in [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "chmod"),
                     (shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text")]:
    setattr(module, name, dying(getattr(module, name)))
"""
WRITE_FILE = """
with files.atomic_write(target) as part:
    part.write_text("new")
"""
WRITE_FOLDER = """
from internvl3_mlx.write_guards import FolderKind
ANYTHING = FolderKind("anything", ("*",), ((),))
with files.atomic_folder(target, overwrite=True, replaceable=ANYTHING) as part:
    (part / "inner").mkdir()
    (part / "inner" / "a.txt").write_text("new")
    (part / "b.txt").write_text("new")
"""
WRITE_FILES = """
with files.atomic_files(target, ("a.txt", "b.txt")) as aside:
    (aside / "a.txt").write_text("new")
    (aside / "b.txt").write_text("new")
"""
ANYTHING = FolderKind("anything", ("*",), ((),))
CALLS = 16  # more than either writer makes


def run_killed(body: str, target: Path, at: int, when: str) -> bool:
    """Run a writer in a process that kills itself at a call; return whether it did."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED + body, str(target), str(at), when],
        cwd=Path(files.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_is_old_or_new_at_every_kill_point(tmp_path, when):
    target, killed, seen = tmp_path / "data.json", 0, set()
    for at in range(1, CALLS):
        target.write_text("old")
        killed += run_killed(WRITE_FILE, target, at, when)
        seen.add(target.read_text())
    assert seen == {"old", "new"}
    assert 4 <= killed < CALLS - 1  # write, chmod, flush, rename, flush of the folder
    with atomic_write(target) as part:
        part.write_text("next")
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_is_old_or_new_at_every_kill_point(tmp_path, when):
    old, new = {"a.txt": "old"}, {"inner/a.txt": "new", "b.txt": "new"}
    killed, unnamed = 0, 0
    for at in range(1, CALLS):
        place = tmp_path / str(at)
        target = place / "model"
        target.mkdir(parents=True)
        (target / "a.txt").write_text("old")
        killed += run_killed(WRITE_FOLDER, target, at, when)
        unnamed += not target.exists()
        recover_folder(target)
        assert tree(target) in (old, new)
        assert [path.name for path in place.iterdir()] == ["model"]
    assert 8 <= killed < CALLS - 1
    assert unnamed == 1  # killed between the two renames, and recovered


def test_a_folder_set_aside_by_a_killed_run_counts_as_existing(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a.txt").write_text("old")
    at = next(n for n in range(1, CALLS) if killed_between(target, n))
    assert at
    with pytest.raises(WriteError, match="model exists"), atomic_folder(target):
        pass
    assert tree(target) == {"a.txt": "old"}


def killed_between(target: Path, at: int) -> bool:
    recover_folder(target)
    if tree(target) != {"a.txt": "old"}:
        return False
    run_killed(WRITE_FOLDER, target, at, "after")
    return not target.exists()


def test_files_of_a_folder_are_replaced_and_the_others_stay(tmp_path):
    for name in ("a.txt", "mine.txt"):
        (tmp_path / name).write_text("old")
    with atomic_files(tmp_path, ("a.txt", "b.txt")) as aside:
        for name in ("a.txt", "b.txt"):
            (aside / name).write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert tree(tmp_path) == {"a.txt": "new", "b.txt": "new", "mine.txt": "old"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_each_of_several_files_is_old_or_new_at_every_kill_point(tmp_path, when):
    names, seen = ("a.txt", "b.txt"), set()
    for at in range(1, CALLS):
        for name in names:
            (tmp_path / name).write_text("old")
        if not run_killed(WRITE_FILES, tmp_path, at, when):
            break
        seen.add(tuple((tmp_path / name).read_text() for name in names))
    assert seen == {("old", "old"), ("new", "old"), ("new", "new")}
    with atomic_files(tmp_path, names) as aside:
        for name in names:
            (aside / name).write_text("next")
    assert tree(tmp_path) == dict.fromkeys(names, "next")


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "data.json"
    target.write_text("old")
    with pytest.raises(WriteError, match="data.json: Input/output error; nothing was left behind"):
        write_file_and_fail(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_an_error_in_the_block_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a.txt").write_text("old")
    with pytest.raises(WriteError, match="model: Input/output error; nothing was left behind"):
        write_folder_and_fail(target)
    assert tree(target) == {"a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def write_file_and_fail(target: Path) -> None:
    with atomic_write(target) as part:
        part.write_text("half")
        raise OSError(5, "Input/output error")


def write_folder_and_fail(target: Path) -> None:
    with atomic_folder(target, overwrite=True, replaceable=ANYTHING) as part:
        (part / "b.txt").write_text("half")
        raise OSError(5, "Input/output error")


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "model", os.rename
    target.mkdir()
    (target / "a.txt").write_text("old")

    def refuse_part(source, place):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(os, "rename", refuse_part)
    with (
        pytest.raises(WriteError, match="Input/output error"),
        atomic_folder(target, overwrite=True, replaceable=ANYTHING),
    ):
        pass
    assert tree(target) == {"a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_yielded_file_keeps_the_suffix(tmp_path):
    with atomic_write(tmp_path / "x.safetensors") as part:
        assert part.suffix == ".safetensors"
        assert part.name.startswith(f".x.safetensors.{os.getpid()}-")
        part.write_text("x")


def test_permissions_of_a_replaced_file_remain(tmp_path):
    target = tmp_path / "private.json"
    target.write_text("old")
    target.chmod(0o600)
    with atomic_write(target) as part:
        part.write_text("new")
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_link_remains_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as part:
        part.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "x.txt") as part:
        part.write_text("x")
    file, folder = (path.stat().st_ino for path in (tmp_path / "x.txt", tmp_path))
    assert events == [file, "rename", folder]


def test_every_file_of_a_folder_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with atomic_folder(tmp_path / "model") as part:
        (part / "inner").mkdir()
        (part / "inner" / "a.txt").write_text("a")
    inside = [tmp_path / "model" / name for name in (".", "inner", "inner/a.txt")]
    assert {path.stat().st_ino for path in inside} == {*events[: events.index("rename")]}
    assert events[-1] == tmp_path.stat().st_ino


def test_a_mac_is_asked_to_flush_the_drive_too(tmp_path, monkeypatch):
    import fcntl

    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: asked.append(command))
    with atomic_write(tmp_path / "x.txt") as part:
        part.write_text("x")
    assert asked == [51, 51]  # the file and its folder


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    dead = tmp_path / f".out.{done.stdout.strip()}-0.part"
    alive = tmp_path / f".out.{os.getppid()}-0.part"
    earlier = tmp_path / f".out.{os.getpid()}-999999.part"  # our id, before this process had it
    other = tmp_path / f".out.json.{done.stdout.strip()}-0.part"
    for folder in (dead, alive, earlier, other):
        folder.mkdir()
    with atomic_folder(tmp_path / "out") as part:
        (part / "x").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, other.name}


def test_partial_files_of_dead_processes_are_removed_from_a_folder(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {f".a.safetensors.{gone.pid}-0.part.safetensors", f".b.{os.getppid()}-3.part", "c.part"}
    for name in names:
        (tmp_path / name).write_text("part")
    with atomic_write(tmp_path / "d") as part:
        part.write_text("mine")
        remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names - {min(names)} | {"d"}


def test_a_cache_file_is_written_aside_without_waiting_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited for the disk"))
    with atomic_write(tmp_path / "a", durable=False) as part:
        part.write_text("new")
        assert not (tmp_path / "a").exists()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_two_writers_of_one_process_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "x.txt"
    with atomic_write(target) as outer:
        outer.write_text("outer")
        with atomic_write(target) as inner:
            inner.write_text("inner")
        assert target.read_text() == "inner"
    assert target.read_text() == "outer"


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(WriteError, match="model exists"), atomic_folder(target):
        target.mkdir()
    assert [*target.iterdir()] == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/x.txt", r"cannot write .*x.txt: No such file or directory; nothing was left"),
        ("folder", "folder is a folder; name a file"),
        ("pipe", "pipe is not a regular file; name another file"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, place, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match=message), atomic_write(tmp_path / place) as part:
        part.write_text("x")


def test_a_folder_never_replaces_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(WriteError, match="out exists; name another folder$"),
        atomic_folder(tmp_path / "out", overwrite=True),
    ):
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"INTERNVL3_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b/kernels"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/internvl3-mlx/kernels"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/internvl3-mlx/kernels"),
        ({}, "/home/u/.cache/internvl3-mlx/kernels"),
    ],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, environment, expected):
    for name in ("INTERNVL3_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/u", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("kernels") == Path(expected)


def test_an_unknown_key_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"r.yaml: unknown key 'grop_size'; did you mean group_s"):
        check_keys({"bits": 4, "grop_size": 64}, ["bits", "group_size"], "r.yaml")


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("convrt", {}, "did you mean convert?"),
        ("q_prj", {"limit": 3, "cutoff": 0.5}, "did you mean q_proj, o_proj or up_proj?"),
        ("zzz", {}, "choose from convert, train, q_proj, o_proj, up_proj"),
        ("zzz", {"otherwise": "see --help"}, "see --help"),
        ("convrt", {"cutoff": 0.99, "otherwise": ""}, ""),
    ],
)
def test_a_hint_names_what_is_near(name, options, hint):
    known = ["convert", "train", "q_proj", "o_proj", "up_proj"]
    assert did_you_mean(name, known, **options) == hint


def test_a_digest_depends_on_content_and_on_where_parts_end(tmp_path):
    (tmp_path / "x").write_bytes(b"ab")
    assert content_digest("ab", b"c") == content_digest(tmp_path / "x", memoryview(b"c"))
    assert content_digest("ab", "c") != content_digest("a", "bc")
    assert len(content_digest("ab")) == 32
    assert len(content_digest("ab", size=8)) == 16
