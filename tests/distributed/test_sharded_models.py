"""Models divided among ranks on loopback compute what one process computes."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures.flash import build_flash
from fixtures.inputs import random_image, random_pixels, relative_error, token_row, write_video
from fixtures.lora_models import stirred
from fixtures.rank_processes import launch_ranks
from fixtures.shards import divisible
from fixtures.tiny import Bits
from fixtures.tolerances import DIVISION_TOLERANCE

from internvl3_mlx.generation.compiled_step import can_compile
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora, save_model_adapter

sys.path.append(str(Path(__file__).parent))
import ranks_of_models

FOUR, EIGHT = Bits(bits=4, group_size=32), Bits(bits=8, group_size=32)
MODELS = {
    "qwen2": {},
    "qwen2-4": {"layout": "mlx", "bits": FOUR},
    "qwen2-8": {"layout": "mlx", "bits": EIGHT},
    "tied": {"layout": "hf_b", "tied": True},
    "internlm3": {"style": "9b"},
    "qwen3": {"style": "qwen3"},
    "qwen3_moe": {"style": "qwen3_moe"},
    "gpt_oss": {"style": "gpt_oss"},
    "gpt_oss-4": {"style": "gpt_oss", "layout": "mlx", "bits": FOUR},
}
ADAPTERS = {
    "lora": ("qwen2", {}),
    "lora-8": ("qwen2-8", {}),
    "dora": ("qwen2", {"dora": True}),
    "dora-4": ("qwen2-4", {"dora": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def jobs(folder):
    """Name what is computed: three tiles in two images, so that no number of ranks divides them."""
    found = {}
    for name, changes in MODELS.items():
        checkpoint = divisible(folder / name, **changes)
        found[name] = logits_job(checkpoint, folder / f"{name}.npy")
    return found


@pytest.fixture(scope="module")
def more_jobs(folder, jobs):
    """Name what is computed on two ranks alone: conversations, messages, and a router."""
    video = str(write_video(folder / "video.mp4", 12))
    images = []
    for n, size in enumerate([(120, 50), (60, 70)]):
        images.append(str(folder / f"image{n}.png"))
        random_image(*size, seed=n).save(images[-1])
    options = {"max_tokens": 9, "max_tiles": 3}
    questions = [["What is this?", images], ["And now?", images[:1]]]
    unillustrated = [["Who?", []], ["Why?", []]]
    quantized = {"kv_bits": 8, "kv_group_size": 32}
    talk = {"kind": "talk", "options": options, "questions": questions}
    flash = build_flash(folder / "flash")
    plain = str(folder / "qwen2")
    positions = [0.25 * n for n in range(len(jobs["qwen2"]["ids"]))]
    shown = {"video": [video], "num_frames": 3, "v2pe_delta": 0.25}
    return {
        "flash": logits_job(flash, folder / "flash.npy"),
        "v2pe": jobs["qwen2"] | {"positions": positions},
        "talk": talk | {"folder": plain},
        "talk-4": talk | {"folder": str(folder / "qwen2-4"), "options": options | quantized},
        "talk-gpt_oss": talk | {"folder": str(folder / "gpt_oss")},
        "video": talk | {"folder": plain, "questions": unillustrated, "first": shown},
        "messages": {"kind": "messages", "folder": plain, "pixels": jobs["qwen2"]["pixels"]},
        "compiled": {"kind": "compiled"},
        **{name: adapted_job(folder, jobs, name, *how) for name, how in ADAPTERS.items()},
    }  # fmt: skip


def adapted_job(folder, jobs, name, base, changes):
    """Write an adapter of all matrices of the decoder, trained in one process, and its job."""
    model = load_local_model(folder / base, for_training=True).model
    settings = LoRAConfig(rank=3, alpha=7.0, keys=("language", "lm_head"), **changes)
    mx.random.seed(3)
    add_lora(model, settings)
    stirred(model, 3)
    save_model_adapter(model, folder / f"{name}-adapter", settings)
    return jobs[base] | {"adapter": str(folder / f"{name}-adapter")}


def logits_job(checkpoint, pixels):
    np.save(pixels, random_pixels(checkpoint, 3))
    return {
        "kind": "logits",
        "folder": str(checkpoint.folder),
        "pixels": str(pixels),
        "ids": token_row(checkpoint, [2, 1]),
    }


@pytest.fixture(scope="module")
def alone(jobs, more_jobs):
    return ranks_of_models.run_jobs({**jobs, **more_jobs})


@pytest.fixture(scope="module")
def two(folder, jobs, more_jobs):
    compiled = {"talk-compiled": more_jobs["talk"] | {"compile": "on"}} if can_compile() else {}
    every = {**jobs, **more_jobs, **compiled}
    return launch_ranks(Path(ranks_of_models.__file__), folder, every, 2)


@pytest.fixture(scope="module")
def four(folder, jobs):
    return launch_ranks(Path(ranks_of_models.__file__), folder, jobs, 4)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_process(request, alone, name, size):
    ranks = request.getfixturevalue({2: "two", 4: "four"}[size])
    expected = alone[f"{name}/logits"]
    for rank in ranks:
        assert relative_error(rank[f"{name}/logits"], expected) < DIVISION_TOLERANCE
        assert np.array_equal(rank[f"{name}/logits"], ranks[0][f"{name}/logits"])


@pytest.mark.parametrize("name", ["flash", "v2pe"])
def test_routers_and_fractional_positions_give_the_logits_of_one_process(alone, two, name):
    for rank in two:
        assert relative_error(rank[f"{name}/logits"], alone[f"{name}/logits"]) < DIVISION_TOLERANCE


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_cut_with_the_weights_that_they_change(alone, two, name):
    base = alone[f"{ADAPTERS[name][0]}/logits"]
    assert relative_error(alone[f"{name}/logits"], base) > 0.01
    for rank in two:
        assert relative_error(rank[f"{name}/logits"], alone[f"{name}/logits"]) < DIVISION_TOLERANCE


def test_both_forms_of_tiles_and_their_probabilities_are_in_order(alone, two):
    for key in ("flash/features", "flash/probability"):
        for rank in two:
            assert relative_error(rank[key], alone[key]) < DIVISION_TOLERANCE


@pytest.mark.parametrize("name", ["talk", "talk-4", "talk-gpt_oss", "video"])
def test_two_turns_have_the_tokens_of_one_process(alone, two, name):
    for turn in range(2):
        expected = alone[f"{name}/tokens{turn}"]
        assert len(expected) > 1
        for rank in two:
            assert rank[f"{name}/tokens{turn}"].tolist() == expected.tolist()
            assert rank[f"{name}/cached{turn}"] == alone[f"{name}/cached{turn}"]
    assert alone[f"{name}/cached1"] > 0


@pytest.mark.parametrize("name", ["qwen2", "qwen2-4", "gpt_oss"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_and_what_all_hold(request, alone, folder, name, size):
    ranks = request.getfixturevalue({2: "two", 4: "four"}[size])
    whole = int(alone[f"{name}/nbytes"])
    shared = replicated_nbytes(folder / name)
    for rank in ranks:
        padding = 0.02 * whole  # rows of zeros of the head
        assert int(rank[f"{name}/nbytes"]) <= shared + (whole - shared) / size + padding


def replicated_nbytes(folder):
    """Count what no rank divides: embedding, norms and routers."""
    from mlx.utils import tree_flatten

    from internvl3_mlx.checkpoints.build_model import assemble_model

    model = assemble_model(folder).model.language_model
    whole = ("embed_tokens", "norm", "mlp.gate.", "router", "o_proj.bias")
    found: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return sum(x.nbytes for name, x in found if any(part in name for part in whole))


def test_a_token_sends_two_sums_a_layer_and_one_part_of_the_logits(two, alone):
    layers, width = 3, 128
    for rank in two:
        assert rank["messages/token_sum"].tolist() == [4 * width] * 2 * layers
        vocabulary = alone["qwen2/logits"].shape[-1]
        [gathered] = rank["messages/token_gather"]
        assert vocabulary / 2 <= gathered / 4 < vocabulary / 2 + 8
        [features] = rank["messages/tiles_gather"]  # two of three tiles, 4 tokens each
        assert features == 2 * 4 * width * 4
        assert rank["messages/tiles_sum"].size == 0


@pytest.mark.skipif(not can_compile(), reason="MLX needs a C++ compiler on a CPU")
def test_compiled_steps_of_parts_have_the_tokens_of_one_process(alone, two):
    for rank in two:
        for turn in range(2):
            tokens = alone[f"talk/tokens{turn}"].tolist()
            assert rank[f"talk-compiled/tokens{turn}"].tolist() == tokens
            assert rank[f"talk-compiled/compiled{turn}"] == len(tokens) - 1


def test_messages_can_be_compiled(two):
    for rank in two:
        sums = [2 * (1 + 4), 2 * (4 + 9)]
        assert rank["compiled/twice"].tolist() == [[[s] * 4] * 2 for s in sums]
