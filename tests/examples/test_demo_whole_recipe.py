"""The demo's recipe in one command: it goes on where it stopped, and nothing half-made is taken
for done."""

import json
import os
import stat
import sys

import pytest
import torch

from examples.demo_model import fetch, recipe
from examples.demo_model.recipe import Place, Step, is_done, run_all

WRITE = "import sys; open(sys.argv[1], 'a').write('made ')"


def writing(path, *sources):
    """Give a step that appends to a file."""
    return Step(("-c", WRITE, str(path)), path, sources)


@pytest.fixture
def run(tmp_path):
    """Give a function that runs steps under the lock of a folder."""

    def run_steps(*steps):
        with recipe.only_one(tmp_path) as lock:
            run_all(iter(steps), tmp_path / "drawings.npz", lock)

    return run_steps


def test_a_step_that_failed_is_where_the_next_run_goes_on(run, tmp_path, capfd):
    first, last = writing(tmp_path / "first"), writing(tmp_path / "last")
    failing = Step(("-c", "raise SystemExit(3)"), tmp_path / "never")
    with pytest.raises(SystemExit, match="failed with 3; run again to go on from here"):
        run(first, failing, last)
    assert not last.result.exists()
    run(first, last)
    assert first.result.read_text() == last.result.read_text() == "made "
    assert capfd.readouterr().out.count("# done") == 1


def test_what_was_made_of_older_results_is_made_again(run, tmp_path):
    state, exported = tmp_path / "weights", tmp_path / "exported"
    made = (writing(state), writing(exported, state))
    run(*made)
    now = exported.stat().st_mtime
    os.utime(state, (now + 60, now + 60))
    run(*made)
    assert state.read_text() == "made "
    assert exported.read_text() == "made made "


def test_a_training_is_done_with_its_last_step(tmp_path):
    step = Step(("-m", "train"), tmp_path / "state.pt")
    assert not is_done(step)
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 7, "decay_from": 3}))
    torch.save({"done": 6}, step.result)
    assert not is_done(step)
    torch.save({"done": 7}, step.result)
    assert is_done(step)


def test_a_second_run_is_refused(run, tmp_path):
    with recipe.only_one(tmp_path), pytest.raises(SystemExit, match="at work in .*: wait for it"):
        run(writing(tmp_path / "never"))
    run(writing(tmp_path / "later"))
    assert not (tmp_path / "never").exists()


def test_a_step_whose_recipe_was_killed_still_shuts_out_others(tmp_path):
    """The step holds the lock, too: its descriptor is the one of the recipe."""
    told = tmp_path / "told"
    with recipe.only_one(tmp_path) as lock:
        code = f"import os; os.fstat({lock}); open({str(told)!r}, 'w')"
        run_all(iter([Step(("-c", code), told)]), tmp_path, lock)
    assert told.exists()


def test_ending_the_recipe_ends_its_step(run, tmp_path):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    with pytest.raises(SystemExit) as ended:
        run(Step(("-c", code), tmp_path / "never"))
    assert ended.value.code == 143


def test_every_command_follows_from_what_the_ones_before_leave(tmp_path):
    place = Place(tmp_path, tmp_path, tmp_path / "package")
    made = [*recipe.steps(place, recipe.WHOLE, workers=2)]
    results = [step.result for step in made]
    assert len(set(results)) == len(results)
    for number, step in enumerate(made):
        assert set(step.sources) <= set(results[:number])
    trained = [step.arguments for step in made if step.result.name == "state.pt"]
    assert [arguments[2] for arguments in trained] == list(recipe.TRAINING)
    for arguments, (_, steps) in zip(trained, recipe.TRAINING.values(), strict=True):
        assert {"--steps", str(steps), "--pictures", "32"} <= set(arguments)


def test_a_trial_keeps_its_weights_apart(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(recipe, "run_all", lambda steps, *_: ran.extend(steps))
    monkeypatch.setattr(sys, "argv", ["recipe", "--work", str(tmp_path), "--trial"])
    recipe.main()
    trial = tmp_path / "trial"
    assert all(trial in step.result.parents for step in ran[3:])
    assert ran[-1].arguments[-2:] == ("--out", str(trial / "package"))


@pytest.mark.parametrize("given", [[], ["--trial", "--out", "package"]])
def test_either_a_package_or_a_trial_is_asked_for(monkeypatch, tmp_path, given, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe", "--work", str(tmp_path / "work"), *given])
    with pytest.raises(SystemExit) as refused:
        recipe.main()
    assert refused.value.code == 2
    assert "give --out, the folder of the model package, or --trial" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def clients(monkeypatch, tmp_path):
    """Put package clients on the path that write little and fail once in the middle."""
    folder = tmp_path / "clients"
    folder.mkdir()
    fail_once = f'if [ ! -e "{folder}/$0.failed" ]; then touch "{folder}/$0.failed"; exit 1; fi'
    fail_once = fail_once.replace("$0", "${0##*/}")
    install = f"mkdir -p node_modules/@iconify-json/tabler\n{fail_once}"
    install += '\nfor name in "$@"; do case $name in @*) mkdir -p "node_modules/$name";; esac; done'
    program(folder, "npm", install)
    program(
        folder,
        "apt-get",
        f'shift\nfor name in "$@"; do echo data > "${{name}}_1_all.deb"; done\n{fail_once}',
    )
    program(folder, "dpkg", 'echo "$2" >> unpacked')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_downloads_that_stopped_in_the_middle_are_made_again(clients, tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    monkeypatch.setattr(sys, "argv", ["fetch", "--packages", str(packages)])
    with pytest.raises(SystemExit, match="npm failed in .*: see above"):
        fetch.main()
    assert not (packages / "node_modules").exists()
    with pytest.raises(SystemExit, match="apt-get failed in"):
        fetch.main()
    assert (packages / "node_modules" / "@iconify-json" / "noto").is_dir()
    assert not list(packages.glob("*.deb"))
    assert not (packages / "complete").exists()
    fetch.main()
    assert len(list(packages.glob("*.deb"))) == len(fetch.FONT_PACKAGES) + 1
    assert len((packages / "unpacked").read_text().splitlines()) == len(fetch.FONT_PACKAGES) + 1
    assert (packages / "complete").exists()
    assert not (packages / "unfinished").exists()


def test_a_client_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fetch", "--packages", str(tmp_path / "packages")])
    with pytest.raises(SystemExit, match="npm is not installed; install it"):
        fetch.main()
