"""The shipped demo model really sees, and computes what the PyTorch model it came from computes."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

import internvl3_mlx.demo
from examples.demo_model.batches import POLICY
from examples.demo_model.evaluate import decode, library_asker
from examples.demo_model.heldout import COLUMNS, items
from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.published import published_weights
from examples.demo_model.rows import RowBuilder
from examples.demo_model.tokenizer import open_tokenizer
from internvl3_mlx import load
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.images.tiling import normalize, to_tiles

DEMO = Path(internvl3_mlx.demo.__file__).parent
LARGEST_BYTES = 8_000_000
TOLERANCE = 2e-4  # float32, largest difference over largest magnitude
TOLD = ["name", "category", "color", "count_all", "where", "exists"]
FEW, ENOUGH = 24, 0.75  # a sanity check; the card tells what 200 pictures a task give
LONG = {"phone 9:19": 3, "panorama 3:1": 4}  # tiles, the thumbnail among them
LARGE = {"large square": 5, "portrait 3:4": 5, "photo 4:3, 12 MP": 5, "wide 16:9": 3}


@pytest.fixture(scope="module")
def shipped():
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def original():
    """Fill the recipe's own PyTorch model with the shipped weights."""
    tokenizer = open_tokenizer(DEMO / "tokenizer.json")
    model = InternVL(DemoConfig(tokenizer.get_vocab_size())).eval()
    model.load_state_dict(published_weights(DEMO))
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
    inputs = shipped.prepare_inputs("Where is the dog?", [picture], v2pe_delta=delta)
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


@pytest.mark.parametrize("column", LONG)
@pytest.mark.parametrize("task", ["name", "count_all", "where", "at"])
def test_long_pictures_are_answered_right(shipped, column, task):
    asked = items(task, COLUMNS[column], FEW)
    answers = [shipped.ask(item.question.text, [item.picture]).text for item in asked]
    right = [answer == item.question.answer for answer, item in zip(answers, asked, strict=True)]
    assert np.mean(right) >= ENOUGH


@pytest.mark.parametrize(("column", "tiles"), [("square", 1), *LONG.items(), *LARGE.items()])
def test_the_evaluation_asks_about_all_tiles_of_whole_pictures(monkeypatch, column, tiles):
    seen, prepare = [], ModelRunner.build_inputs

    def prepared(vlm, question, images, settings, *features):
        inputs = prepare(vlm, question, images, settings, *features)
        seen.append((images[0].size, inputs.num_tiles, inputs.image_tokens))
        return inputs

    monkeypatch.setattr(ModelRunner, "build_inputs", prepared)
    (item,) = items("name", COLUMNS[column], 1)
    library_asker("demo")([item.picture], [item.question.text], 1.0)
    scaled = tuple(side * COLUMNS[column].scale for side in COLUMNS[column].size)
    assert seen == [(scaled, [tiles], 16 * tiles)]


def test_the_largest_pictures_have_twelve_megapixels():
    (item,) = items("name", COLUMNS["photo 4:3, 12 MP"], 1)
    assert item.picture.width * item.picture.height >= 12_000_000


@pytest.mark.parametrize("sample", json.loads((DEMO / "samples" / "samples.json").read_text()))
def test_the_samples_are_answered_right(shipped, sample):
    answer = shipped.ask(sample["question"], [DEMO / "samples" / sample["file"]])
    assert answer.text == sample["answer"]
