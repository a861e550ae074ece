"""Every example configuration trains the demo model for one update."""

import re
from pathlib import Path

import pytest
from fixtures.records import write_jsonl
from fixtures.train_sessions import select, write_data

import internvl3_mlx
from internvl3_mlx.training.config import METHODS
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.events import CheckpointSaved, UpdateDone
from internvl3_mlx.training.run import train

ROOT = Path(internvl3_mlx.__file__).parents[1]
CONFIGS = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if "internvl3 train" in path.read_text("utf-8")
)
# small enough for a test; all other settings are those of the configuration
TINY = {
    "model": "demo", "iters": 1, "epochs": 1, "batch_size": 2, "grad_accumulation_steps": 1,
    "max_tiles": 1, "max_seq_length": 120, "cache_features": False,
}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_example_configuration_makes_an_update(path, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    own = build_config({}, path)
    write_data(tmp_path / "data", 4, 1, pairs=own.reads_pairs, labels=own.reads_labels)
    tiny = TINY
    if own.trains_critic:
        tiny = TINY | {"max_seq_length": 1000}  # the published system prompt is long
        row = {"question": "Who?", "steps_with_score": [{"step": "A cat.", "score": 1}]}
        for split in ("train", "valid"):
            write_jsonl(tmp_path / "data" / f"{split}.jsonl", [row])
    if own.samples_answers:  # the demo model is never nearly right: reward something else
        (tmp_path / "reward.py").write_text("def length(answer, expected): return len(answer)\n")
        reward = f"{tmp_path / 'reward.py'}:length"
        tiny = TINY | {"reward": reward, "max_completion_length": 9}
    own_valid = {"valid_data": str(tmp_path / "data" / "valid.jsonl")} if own.valid_data else {}
    where = own_valid | {"data": str(tmp_path / "data"), "adapter_path": str(tmp_path / "run")}
    if own.teacher is not None:
        where["teacher"] = "demo"
    config = build_config({**tiny, **where}, path)
    events = [*train(config)]
    [update] = select(events, UpdateDone)
    assert update.grad_norm > 0
    assert not update.skipped
    assert len(select(events, CheckpointSaved)) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_example_configuration_says_how_to_run_it(path):
    command = re.search(r"^# internvl3 train -c (\S+)", path.read_text("utf-8"), re.M)
    assert ROOT / command[1] == path


def test_there_is_an_example_for_every_method():
    assert {build_config({}, path).method for path in CONFIGS} == {*METHODS}
