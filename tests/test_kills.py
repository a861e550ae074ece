"""A process killed anywhere loses nothing: not the source, not the old result, no free space.

Convert, fuse, save and first use are killed at random calls and on both sides of every rename. What
has the target's name afterwards is the old result or the new one, and the next run leaves nothing
beside it.
"""

import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
from fixtures.inputs import random_image
from fixtures.killed_operations import kill_server
from fixtures.loaded_models import tiny
from fixtures.lora_models import adapted
from fixtures.tiny import Recipe

from internvl3_mlx import convert_model, load
from internvl3_mlx.files import content_digest
from internvl3_mlx.training.lora_setup import save_model_adapter

RANDOM_KILLS = 10  # of each of the four operations
MARKS = {"CACHEDIR.TAG"}  # tells backups what a cache is
HUB_FILES = (".json", ".safetensors", ".txt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with an older result of every kind."""
    folder = tmp_path_factory.mktemp("kills")
    checkpoint = tiny(Recipe())
    source = shutil.copytree(checkpoint.folder, folder / "source")
    model, config = adapted(checkpoint)
    save_model_adapter(model, folder / "adapter", config)
    convert_model(source, folder / "older" / "model", bits=8, group_size=32, verify=False)
    vlm = load(str(source))
    for name, question in (("older/talk.zip", "What is it?"), ("newer.zip", "And this?")):
        conversation = vlm.conversation(max_tokens=3)
        conversation.ask(question, [random_image(60, 50)])
        conversation.save(folder / name, cache=True)
    snapshot = folder / "hf/hub/models--OpenGVLab--InternVL3-1B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    for path in source.iterdir():
        if path.suffix in HUB_FILES:
            shutil.copy(path, snapshot)
    return folder


@pytest.fixture(scope="module")
def run(place):
    env = {
        **os.environ,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "INTERNVL3_CACHE": str(place / "work"),
    }
    with kill_server(env) as run_operation:
        yield run_operation


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): content_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def operations(place: Path) -> dict[str, tuple[str, dict[str, str], list[str]]]:
    """Return the name, the arguments and the targets of each operation."""
    source, work = str(place / "source"), place / "work"
    model, talk = {"source": source, "target": str(work / "model")}, str(work / "talk.zip")
    saving = {"source": source, "saved": str(place / "newer.zip"), "target": talk}
    return {
        "convert": ("convert", model, ["model"]),
        "fuse": ("convert", {**model, "adapter": str(place / "adapter")}, ["model"]),
        "save": ("save", saving, ["talk.zip", "talk.zip.safetensors"]),
        "first use": ("first_use", {}, ["InternVL3-1B-4bit"]),
    }


def start_over(place: Path) -> Path:
    shutil.rmtree(place / "work", ignore_errors=True)
    return Path(shutil.copytree(place / "older", place / "work"))


def contents(work: Path, targets: list[str]) -> list[dict[str, str]]:
    """Return what each target holds; nothing for one that does not exist."""
    return [
        entries(work / name) if (work / name).is_file() else tree(work / name) for name in targets
    ]


def entries(path: Path) -> dict[str, str]:
    """Digest a file; of an archive the entries, whose dates are not what was saved."""
    if path.suffix != ".zip":
        return {path.name: content_digest(path)}
    with zipfile.ZipFile(path) as file:
        return {name: content_digest(file.read(name)) for name in file.namelist()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "fuse", "save", "first use"])
def test_killed_anywhere_the_old_or_the_new_is_whole(place, run, name):
    operation, arguments, targets = operations(place)[name]
    untouched = {part: tree(place / part) for part in ("source", "adapter", "hf")}
    work = start_over(place)
    old, beside = contents(work, targets), {*os.listdir(work), *targets}
    _, (calls, renames) = run(operation, **arguments)
    new = contents(work, targets)
    assert old != new
    assert renames >= 2
    chance = random.Random(name)
    points = [{"rename": number} for number in range(1, renames + 1)]
    points += [{"call": chance.randint(1, calls)} for _ in range(RANDOM_KILLS)]
    killed, seen = 0, []
    for point in points:
        work = start_over(place)
        killed += run(operation, **arguments, **point)[0]
        for found, before, after in zip(contents(work, targets), old, new, strict=True):
            # between the two renames the old folder has a hidden name
            found = found or next((tree(path) for path in work.glob(".*.old")), {})
            assert found in (before, after), point
            seen.append((found == before, found == after))
        if "rename" in point:
            run(operation, **arguments)
            assert contents(work, targets) == new, point
            assert {*os.listdir(work)} - MARKS == beside, point
    assert killed >= renames + RANDOM_KILLS - 2  # the number of calls differs a little
    assert {*seen} >= {(True, False), (False, True)}
    run(operation, **arguments)
    assert {*os.listdir(work)} - MARKS == beside
    assert {part: tree(place / part) for part in untouched} == untouched
