"""Every recipe that ships reads, and makes an update on the demo model."""

import re
from pathlib import Path

import pytest
from fixtures.train_sessions import ignore_progress, write_data

import internvl3_mlx
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import open_train_session
from internvl3_mlx.training.setup import prepare_run

ROOT = Path(internvl3_mlx.__file__).parents[1]
RECIPES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if "internvl3 train" in path.read_text("utf-8")
)
# what a test can wait for; all else is the recipe's
TINY = {
    "model": "demo", "iters": 1, "epochs": 1, "batch_size": 2, "grad_accumulation_steps": 1,
    "max_tiles": 1, "max_seq_length": 120, "cache_features": False,
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_makes_an_update(path, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    own = build_config({}, path)
    write_data(tmp_path / "data", 4, 1, pairs=own.method == "mpo")
    where = {"data": str(tmp_path / "data"), "adapter_path": str(tmp_path / "run")}
    recipe = build_config({**TINY, **where}, path)
    here = open_train_session(prepare_run(recipe, ignore_progress, ignore_progress))
    [moment] = run_session(here, lambda: False)
    assert moment.step.grad_norm > 0
    assert not moment.step.skipped
    assert moment.saved


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_says_how_it_is_run(path):
    command = re.search(r"^# internvl3 train -c (\S+)", path.read_text("utf-8"), re.M)
    assert ROOT / command[1] == path


def test_there_is_a_recipe_for_every_method():
    assert {build_config({}, path).method for path in RECIPES} == {"sft", "mpo", "pretrain"}
