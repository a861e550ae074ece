"""Adapters trained on a divided model are those that one process trains."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures.rank_processes import launch_ranks
from fixtures.records import DEMO, write_jsonl
from fixtures.tolerances import (
    DIVISION_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    UPDATES_TOLERANCE,
)
from fixtures.train_sessions import SMALL, critic_rows, write_data
from safetensors.numpy import load_file, save_file

sys.path.append(str(Path(__file__).parent))
import ranks_of_training

from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.tensor_parallel import check_tensor_parallel

UPDATES = 3
# Adam divides by the root of what it has seen: of a gradient near zero, that is mostly rounding
SGD = {"optimizer": "sgd", "learning_rate": 1.0}
DROPOUT = {"lora_dropout": 0.2}
METHODS = {
    "sft": SGD | {"model": "demo"},  # three heads on each rank
    "dora": DROPOUT | {"dora": True, "lora_keys": ["language", "lm_head"], "grad_checkpoint": True},
    "mpo": SGD | {"method": "mpo"},
    "orpo": SGD | {"method": "orpo"},
    "simpo": SGD | {"method": "simpo"},
    "kto": SGD | {"method": "kto"},
    "prm": SGD | {"method": "prm"},
    "vision": SGD | DROPOUT | {"lora_keys": ["language", "vision"]},
    "qlora": SGD | {"q_bits": 4},
    "qdora": SGD | {"q_bits": 4, "dora": True},
}
DATA = {"mpo": "pairs", "orpo": "pairs", "simpo": "pairs", "kto": "labels", "prm": "critic"}
COMMON = SMALL | {"lora_dropout": 0, "num_layers": None, "iters": UPDATES, "max_grad_norm": 0.05}
LAYERS = 2
HEAD_DIM = 32
TEXT = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": HEAD_DIM,
}


def settings(folder, name, run):
    data = str(folder / DATA.get(name, "data"))
    where = {"model": str(folder / "model"), "data": data, "adapter_path": str(folder / run)}
    return COMMON | where | METHODS[name]


def write_model(folder):
    """Write a model like the first layers of the demo, with heads whose halves are groups of 64.

    Its weights are random: what the demo knows must not decide how rounding grows.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("samples", "*.index.json"))
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= TEXT
    config["vision_config"]["num_hidden_layers"] = LAYERS
    del config["demo_trained"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if layer_number(name) < LAYERS}
    random = np.random.default_rng(0)
    drawn = {name: more_heads(name, draw_like(x, random)) for name, x in kept.items()}
    save_file(drawn, folder / "model.safetensors")


def draw_like(x, random):
    """Draw a matrix that keeps the size of what it is multiplied with; leave vectors alone."""
    if x.ndim < 2:
        return x
    fan_in = x[0].size
    return (random.standard_normal(x.shape) / fan_in**0.5).astype(x.dtype)


def layer_number(name):
    _, layers, rest = name.partition(".layers.")
    return int(rest.split(".")[0]) if layers else 0


def more_heads(name, x):
    """Repeat the first heads of a projection, so that there are as many as in ``TEXT``."""
    if "self_attn" not in name:
        return x
    axis = 1 if "o_proj" in name else 0
    heads = TEXT["num_attention_heads" if "q_proj" in name or axis else "num_key_value_heads"]
    return np.take(x, range(HEAD_DIM * heads), axis, mode="wrap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data", 9, 3)
    write_data(folder / "pairs", 9, 3, pairs=True)
    write_data(folder / "labels", 9, 3, labels=True)
    rows = [*critic_rows(folder / "critic", 9)]
    for split, count in (("train", 9), ("valid", 3)):
        write_jsonl(folder / "critic" / f"{split}.jsonl", rows[:count])
    write_model(folder / "model")
    return folder


def jobs(folder, place):
    return {
        name: {
            "settings": settings(folder, name, f"{place}-{name}"),
            "updates": UPDATES,
            "save": True,
        }
        for name in METHODS
    }


@pytest.fixture(scope="module")
def alone(folder):
    """Make all updates in one process, and stop a run after two of them."""
    begun = {
        "settings": settings(folder, "dora", "begun-alone"),
        "updates": 2,
        "save": True,
    }
    ranks_of_training.run(begun, ranks_of_training.SINGLE_PROCESS)
    shutil.copytree(folder / "begun-alone", folder / "continued-by-two")
    return ranks_of_training.run_jobs(jobs(folder, "alone"))


@pytest.fixture(scope="module")
def two(folder, alone):
    """Do the same on two ranks, continue what one began, and begin what one will continue."""
    dora = settings(folder, "dora", "continued-by-two")
    more = {
        "resumed": {"settings": dora, "updates": UPDATES, "resume": True},
        "begun": {
            "settings": settings(folder, "dora", "begun-by-two"),
            "updates": 2,
            "save": True,
        },
    }
    program = Path(ranks_of_training.__file__)
    return launch_ranks(program, folder, jobs(folder, "two") | more, 2)


def own(found, name):
    results = (key.partition("/") for key in found)
    return {key: found[f"{job}/{key}"] for job, _, key in results if job == name}


def differences(one, other):
    assert one.keys() == other.keys()
    return {name: float(np.abs(one[name] - other[name]).max()) for name in one}


@pytest.mark.parametrize("name", METHODS)
def test_three_updates_are_those_of_one_process(alone, two, name):
    expected = own(alone, name)
    for rank in two:
        found = own(rank, name)
        assert found["tokens"].tolist() == expected["tokens"].tolist()
        assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)
        assert found["norm"] == pytest.approx(expected["norm"], rel=GRADIENT_TOLERANCE)
        assert max(differences(found, expected).values()) < UPDATES_TOLERANCE
    moved = [x for key, x in expected.items() if key.endswith("lora_B")]
    assert min(float(np.abs(x).max()) for x in moved) > 1e-4
    assert all(np.array_equal(two[0][key], two[1][key]) for key in two[0])


def test_the_first_gradient_is_that_of_one_process(alone, two):
    """Before any weight differs: the norm over all factors of all layers."""
    for name in METHODS:
        first = two[0][f"{name}/norm"][0]
        assert first == pytest.approx(alone[f"{name}/norm"][0], rel=0.4 * DIVISION_TOLERANCE)


def test_runs_are_continued_by_another_number_of_ranks(folder, alone, two):
    expected = own(alone, "dora")
    resumed = own(two[1], "resumed")
    trained = [key for key in expected if "lora" in key]
    assert (
        max(float(np.abs(resumed[key] - expected[key]).max()) for key in trained)
        < UPDATES_TOLERANCE
    )
    job = {
        "settings": settings(folder, "dora", "begun-by-two"),
        "updates": UPDATES,
        "resume": True,
    }
    back = ranks_of_training.run(job, ranks_of_training.SINGLE_PROCESS)
    assert (
        max(float(np.abs(back[key] - expected[key]).max()) for key in trained) < UPDATES_TOLERANCE
    )


@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_written_whole(folder, alone, two, name):
    file = "adapter_model.safetensors"
    one, other = (load_file(folder / f"{place}-{name}" / file) for place in ("alone", "two"))
    assert {key: x.shape for key, x in one.items()} == {key: x.shape for key, x in other.items()}
    assert max(differences(one, other).values()) < UPDATES_TOLERANCE
    config = "adapter_config.json"
    texts = [(folder / f"{place}-{name}" / config).read_text() for place in ("alone", "two")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 4, "tensor_parallel is 2, but there are 4 processes"),
        ({}, 1, "there are 1 processes; start 2 of them"),
        ({"train": ["lora", "mlp1"]}, 2, "only adapters are trained"),
        ({"compile": True}, 2, "compile cannot be combined with tensor_parallel"),
        ({"method": "mpo", "cache_reference": True}, 2, "cache_reference cannot be"),
    ],
)
def test_what_a_divided_model_cannot_train_is_refused(folder, changes, size, message):
    config = build_config(settings(folder, "sft", "refused") | {"tensor_parallel": 2} | changes)
    with pytest.raises(UserError, match=message):
        check_tensor_parallel(config, ProcessGroup(0, size))
    check_tensor_parallel(replace(config, tensor_parallel=1), ProcessGroup(0, size))
