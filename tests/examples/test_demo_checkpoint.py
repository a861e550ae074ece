"""The shipped demo model really sees, and computes what the PyTorch model it came from computes."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import internvl3_mlx.demo
from examples.demo_model.batches import POLICY
from examples.demo_model.evaluate import decode
from examples.demo_model.heldout import COLUMNS, items
from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.rows import RowBuilder
from examples.demo_model.tokenizer import open_tokenizer
from internvl3_mlx import load
from internvl3_mlx.images.pixels import normalize, to_tiles

DEMO = Path(internvl3_mlx.demo.__file__).parent
LARGEST_BYTES = 8_000_000
TOLERANCE = 2e-4  # float32, largest difference over largest magnitude
TOLD = ["name", "category", "color", "count_all", "where", "exists"]
FEW, ENOUGH = 24, 0.75  # a sanity check; the card tells what 200 pictures a task give
PATCH = "vision_model.embeddings.patch_embedding.weight"


@pytest.fixture(scope="module")
def shipped():
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def original():
    """Fill the recipe's own PyTorch model with the shipped weights."""
    weights = {
        name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()
    }
    if weights[PATCH].shape[1] != 3:  # MLX keeps channels last
        weights[PATCH] = weights[PATCH].permute(0, 3, 1, 2).contiguous()
    tokenizer = open_tokenizer(DEMO / "tokenizer.json")
    model = InternVL(DemoConfig(tokenizer.get_vocab_size())).eval()
    model.load_state_dict(weights)
    return model, RowBuilder(tokenizer, model.config.tokens_per_tile)


def test_the_checkpoint_is_trained_and_small(shipped):
    assert shipped.trained
    assert (DEMO / "model.safetensors").stat().st_size <= LARGEST_BYTES


@pytest.mark.parametrize("delta", [1.0, 1 / 16, 1 / 256])
@pytest.mark.parametrize("size", [(112, 112), (301, 190), (90, 260)])
def test_logits_equal_pytorch(shipped, original, size, delta):
    model, rows = original
    draw = np.random.default_rng(3)
    picture = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    inputs = shipped.prepare("Where is the dog?", [picture], v2pe_delta=delta)
    positions = np.array(inputs.positions, dtype=np.float32)
    ours = shipped.model(inputs.input_ids[None], inputs.pixel_values, mx.array(positions))
    ids = torch.tensor(inputs.input_ids.tolist())[None]
    pixels = torch.from_numpy(normalize(to_tiles(picture, POLICY))).permute(0, 3, 1, 2)
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    with torch.no_grad():
        visual = model.see(pixels)[1]
        hidden = model.read(ids, visual, rows.image_id, torch.tensor(positions)[None], mask)
        theirs = model.language_model.lm_head(hidden).numpy()
    assert np.abs(np.array(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("task", TOLD)
def test_new_pictures_are_answered_right_and_as_pytorch_answers(shipped, original, task):
    asked = items(task, COLUMNS["square"], FEW)
    ours = [shipped.ask(item.question.text, [item.picture], max_tokens=12).text for item in asked]
    tiles = np.stack([to_tiles(item.picture, POLICY) for item in asked])
    assert ours == decode(*original, tiles, [item.question.text for item in asked], 1.0)
    right = [answer == item.question.answer for answer, item in zip(ours, asked, strict=True)]
    assert np.mean(right) >= ENOUGH


@pytest.mark.parametrize("sample", json.loads((DEMO / "samples" / "samples.json").read_text()))
def test_the_samples_are_answered_right(shipped, sample):
    answer = shipped.ask(sample["question"], [DEMO / "samples" / sample["file"]])
    assert answer.text == sample["answer"]
