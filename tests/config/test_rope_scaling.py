"""Rope scaling of every published type and spelling: the numbers of transformers on one folder."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.damaged_checkpoints import copied, edit_config, refusal
from fixtures.loaded_models import numbers
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE
from transformers import InternVLForConditionalGeneration

from internvl3_mlx import ConfigError, convert_model
from internvl3_mlx.config import read_config
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.cache import KVCache

IDS = np.random.default_rng(5).integers(3, 380, size=53).tolist()
YARN = {"factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear in the old spelling": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn in the old spelling": {"type": "yarn", **YARN},
    "yarn with its own window": {"type": "yarn", "factor": 2.0},
    "yarn with all options": {
        "rope_type": "yarn",
        **YARN,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn with an attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 0.8},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "rope_type over type": {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
    "a theta inside": {"rope_type": "yarn", **YARN, "rope_theta": 5e4},
    "default": {"rope_type": "default"},
}


def folder_with(tmp_path, change):
    """Write a checkpoint of 40 positions with other rotary settings of its language model."""
    folder = copied(Recipe(layout="hf_a", max_positions=40), tmp_path)
    edit_config(folder, lambda config: change(config["text_config"]))
    return folder


def relative_difference(folder):
    model = InternVLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS]), use_cache=False).logits.numpy()
    ours = numbers(load_local_model(folder).model(mx.array([IDS])))
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tmp_path, name):
    folder = folder_with(tmp_path, lambda text: text.update(rope_scaling=CASES[name]))
    assert relative_difference(folder) < TOLERANCE


def test_the_spelling_of_transformers_5_equals_transformers(tmp_path):
    def change(text):
        theta = text.pop("rope_theta")
        del text["rope_scaling"]
        text["rope_parameters"] = {"rope_type": "yarn", "rope_theta": theta / 3, **YARN}

    assert relative_difference(folder_with(tmp_path, change)) < TOLERANCE


def test_two_spellings_that_disagree_are_read_as_transformers_reads_them(tmp_path):
    def change(text):
        text["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
        text["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 77.0, **YARN}
        text["rope_theta"] = 3e5

    assert relative_difference(folder_with(tmp_path, change)) < TOLERANCE


def test_a_cached_answer_equals_one_without_a_cache(tmp_path):
    folder = folder_with(tmp_path, lambda text: text.update(rope_scaling=CASES["yarn"]))
    model = load_local_model(folder).model
    whole = numbers(model(mx.array([IDS])))
    cache = [KVCache(64) for _ in model.language_model.model.layers]
    model(mx.array([IDS[:40]]), cache=cache)
    rest = numbers(model(mx.array([IDS[40:]]), positions=40, cache=cache))
    assert np.abs(rest - whole[:, 40:]).max() < 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "mrope", "mrope_section": [1, 2]}, "mrope"),
        ({"type": "yarn"}, "factor"),
        ({"type": "linear", "factor": "2"}, "factor"),
        ({"type": "linear", "factor": 0}, "factor"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 5.0}, "low_freq_factor"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 7}, "alpha"),
        ([1, 2], "rope_scaling"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_scaling_that_is_not_computed_is_refused_by_name(tmp_path, scaling, named):
    folder = folder_with(tmp_path, lambda text: text.update(rope_scaling=scaling))
    assert named in refusal(folder, ConfigError)


def test_a_conversion_to_another_layout_keeps_the_scaling(tmp_path):
    folder = folder_with(
        tmp_path, lambda text: text.update(rope_scaling=CASES["yarn with all options"])
    )
    convert_model(str(folder), tmp_path / "original", layout="original")
    convert_model(str(tmp_path / "original"), tmp_path / "again", layout="hf")
    assert (
        read_config(tmp_path / "again").text.rope_scaling == read_config(folder).text.rope_scaling
    )
    assert read_config(folder).text.rope_scaling.beta_fast == 16
