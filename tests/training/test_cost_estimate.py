"""Memory and time predicted before the first update, against what a run then takes."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.train_sessions import SMALL, small_session, small_setup, write_data

from internvl3_mlx.cli.main import main
from internvl3_mlx.errors import GPUError
from internvl3_mlx.training import cost_estimate
from internvl3_mlx.training.cost_estimate import (
    CostEstimate,
    cheaper_configs,
    estimate_cost,
    planned_model,
)
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.run import run_session

PATIENCE_S = 300
ALL_LAYERS = {"num_layers": None, "batch_size": 7, "lora_dropout": 0.05}
CASES = {
    "lora": ALL_LAYERS,
    "lora without dropout": {**ALL_LAYERS, "lora_dropout": 0.0},
    "gradient checkpointing": {**ALL_LAYERS, "grad_checkpoint": True},
    "dora": {**ALL_LAYERS, "dora": True},
    "few layers": {**ALL_LAYERS, "num_layers": 2},
    "vision": {**ALL_LAYERS, "lora_keys": "language,vision"},
    "full": {"train": "language_model,mlp1", "batch_size": 7},
    "full, momentum": {"train": "language_model", "batch_size": 4, "optimizer": "sgd"},
    "packing": {**ALL_LAYERS, "batch_size": 1, "packing": True, "max_seq_length": 200},
    "accumulation": {**ALL_LAYERS, "batch_size": 3, "grad_accumulation_steps": 2},
    "pairs": {**ALL_LAYERS, "batch_size": 4, "method": "mpo"},
    "labels": {**ALL_LAYERS, "batch_size": 4, "method": "kto"},
}
# what a fresh process does: predict, then train and measure
MEASURE = """
import json, sys, tempfile
from pathlib import Path
import mlx.core as mx
from fixtures.train_sessions import small_session, small_setup, write_data
from internvl3_mlx.training.cost_estimate import estimate_cost
from internvl3_mlx.training.run import run_session
found = {}
for name, settings in json.loads(sys.argv[1]).items():
    folder = Path(tempfile.mkdtemp())
    method = settings.get("method")
    write_data(folder / "data", 7, pairs=method == "mpo", labels=method == "kto")
    cost = estimate_cost(small_setup(folder, iters=2, save_minutes=0, **settings))
    session = small_session(folder, iters=2, save_minutes=0, **settings)
    peak = [event.peak_memory for event in run_session(session) if hasattr(event, "peak_memory")]
    found[name] = cost.memory, peak[-1]
    del session
    mx.clear_cache()
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def measured():
    """Predicted and measured bytes of each case."""
    command = [sys.executable, "-c", MEASURE, json.dumps(CASES)]
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(measured, case):
    predicted, peak = measured[case]
    assert predicted == pytest.approx(peak, rel=0.15), f"{predicted / peak - 1:+.1%}"


def test_the_cases_differ_by_more_than_the_error(measured):
    """A constant would not pass."""
    peaks = [peak for _, peak in measured.values()]
    assert max(peaks) > 2 * min(peaks)


def test_nothing_is_computed_or_drawn_for_the_prediction(tmp_path):
    write_data(tmp_path / "data", 5)
    setup = small_setup(tmp_path, dora=True)
    mx.random.seed(7)
    expected = np.array(mx.random.uniform(shape=(3,)))
    mx.random.seed(7)
    before = mx.get_active_memory()
    model = planned_model(setup, setup.config)
    assert sum(x.nbytes for _, x in named_arrays(model.parameters())) > 10_000_000
    assert mx.get_active_memory() - before < 100_000
    assert np.array_equal(np.array(mx.random.uniform(shape=(3,))), expected)


def test_remedies_are_in_order_and_each_saves_memory(tmp_path):
    write_data(tmp_path / "data", 7)
    setup = small_setup(tmp_path, memory_limit=0.02, **ALL_LAYERS)
    cost = estimate_cost(setup)
    assert not cost.fits
    flags = [flags for flags, _ in cost.remedies]
    assert flags[0] == "--batch-size 1 --grad-accumulation-steps 7"
    assert flags[1] == f"{flags[0]} --grad-checkpoint"
    memory = [cost.memory, *(memory for _, memory in cost.remedies)]
    assert memory == sorted(memory, reverse=True)
    assert memory[-1] <= cost.limit < memory[-2]
    kinds = [
        flags.rpartition("--")[2].split()[0] for flags, _ in cheaper_configs(setup, setup.config)
    ]
    assert kinds == ["grad-accumulation-steps", "grad-checkpoint", "q-bits"]


def run_train(folder, *words):
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in SMALL.items()
        if not isinstance(value, bool)
    ]
    return CliRunner().invoke(main, ["train", "--data", str(folder / "data"), *flags, *words])


def test_check_and_plan_tell_the_cost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", 4)
    shown = run_train(tmp_path, "--check").stdout
    assert "  memory              about " in shown or "memory  " in shown
    cost = json.loads(run_train(tmp_path, "--check", "--json").stdout)["cost"]
    assert cost["fits"]
    parts = ("weights", "training", "activations", "features")
    assert cost["memory"] == sum(cost[name] for name in parts)
    small = run_train(tmp_path, "--dry-run", "--memory-limit", "0.017", "--json").stdout
    plan = json.loads(small.splitlines()[0])
    assert not plan["cost"]["fits"]
    assert plan["cost"]["remedies"][0]["flags"].startswith("--batch-size 1")
    told = run_train(tmp_path, "--dry-run", "--memory-limit", "0.017")
    assert "and this machine may use 17.0 MB; what would make it fit" in told.stderr
    assert "--batch-size 1 --grad-accumulation-steps 2: about" in told.stderr


class Hungry:
    """SFT that runs out of memory in the third update."""

    name, needs_reference = "sft", False

    def __init__(self):
        self.calls, self.inner = 0, OBJECTIVES["sft"]()

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes.")
        return self.inner(*args)


def test_a_run_that_runs_out_of_memory_is_saved_and_told_what_helps(tmp_path):
    write_data(tmp_path / "data", 7)
    here = small_session(tmp_path, iters=9)
    here.state.objective = Hungry()
    with pytest.raises(GPUError) as caught:
        list(run_session(here))
    assert str(caught.value).startswith(
        "memory ran out; try --batch-size 1 --grad-accumulation-steps 2 "
    )
    assert "the run is saved up to update 2; resume with: internvl3 train" in str(caught.value)


def test_seconds_are_of_the_right_order(tmp_path, monkeypatch):
    """The count of operations: twice the samples take twice the time."""
    monkeypatch.setattr("internvl3_mlx.training.step_cost.machine_speed", lambda _: (1e9, 1e9))
    write_data(tmp_path / "data", 6)
    one, two = (
        estimate_cost(small_setup(tmp_path, grad_accumulation_steps=n)).seconds for n in (1, 2)
    )
    assert two == 2 * one > 0
    assert isinstance(cost_estimate.estimate_cost(small_setup(tmp_path)), CostEstimate)
    assert cost_estimate.estimate_cost(small_setup(tmp_path, tensor_parallel=2)) is None
