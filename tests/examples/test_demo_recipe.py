"""The demo model's recipe: what it labels is what it drew, and what it trains is what is asked."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.tiny_demo import TINY
from PIL import Image

from examples.demo_model import batches, export, heldout, scenes
from examples.demo_model.labels import IGNORE, label
from examples.demo_model.model import InternVL, pixel_shuffle
from examples.demo_model.optim import orthogonal, rate
from examples.demo_model.questions import Item, Question, ask
from examples.demo_model.rows import DELTAS, RowBuilder, visual_positions
from examples.demo_model.scenes import SEEN, Cell, Thing, draw
from examples.demo_model.sprites import atlas, draw_sprite
from examples.demo_model.stages import MOSTLY_LONG, MOSTLY_SQUARE
from examples.demo_model.tokenizer import SPECIAL, learn
from examples.demo_model.vocabulary import (
    COLORS,
    CONCEPT_ID,
    DIGITS,
    HELD_OUT_STYLE,
    NAMES,
    QUADRANTS,
    SHAPES,
    TRAIN_STYLES,
)
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.prompt import v2pe as library_positions


@pytest.fixture(scope="module")
def tokenizer():
    return learn()


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def sprite(random, name, side):
    return draw_sprite(random, "noto", name, side, vary=False)


def two_items(rng, size=(150, 90)):
    """Draw a dog at the upper left and a red square at the lower right."""
    plan = [
        (Thing("object", "dog"), Cell(30, 22, 42)),
        (Thing("shape", "square", "red"), Cell(120, 66, 40)),
    ]
    return draw(rng, size, plan, SEEN, sprite)


def test_the_tokenizer_reads_any_text_and_keeps_answer_words_whole(tokenizer):
    words = [w for n in (*NAMES, *SHAPES, *COLORS) for w in (n, f" {n}")]
    assert all(len(tokenizer.encode(word).ids) == 1 for word in (*words, *DIGITS))
    assert [tokenizer.token_to_id(special) for special in SPECIAL] == list(range(len(SPECIAL)))
    text = "Où est-ce? 図 \x00 ½ <|im_end|x>\n\n\t"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_object_is_drawn_in_the_held_out_style_and_in_five_others():
    for name in NAMES:
        styles = {style for style, drawn in atlas() if drawn == name}
        assert HELD_OUT_STYLE in styles
        assert len(styles & set(TRAIN_STYLES)) >= 5
    assert HELD_OUT_STYLE not in TRAIN_STYLES


def test_questions_follow_from_the_items():
    items = [Item("object", "dog", None, 0.2, 0.25), Item("shape", "star", "red", 0.8, 0.3)]
    asked = ask(items, np.random.default_rng(0))
    answers = {(q.task, q.answer) for q in asked}
    assert {("where", "top left"), ("where", "top right"), ("at", "dog"), ("at", "star")} <= answers
    assert {
        ("color", "red"),
        ("shape", "star"),
        ("count_all", "2"),
        ("list", "dog, star"),
    } <= answers
    assert [q.answer for q in asked if q.task == "exists"] == ["yes", "no"]


def test_a_thing_near_a_middle_line_is_in_no_corner():
    items = [Item("object", "dog", None, 0.52, 0.25)]
    assert not [q for q in ask(items, np.random.default_rng(0)) if q.task == "where"]


def test_patches_and_tokens_are_labelled_by_what_covers_them(rng):
    scene = two_items(rng)
    labels = label([scene], (1, 1), 112)
    patch, token = labels.patch.reshape(8, 8), labels.token.reshape(4, 4)
    assert patch[2, 1] == CONCEPT_ID["dog"]
    assert patch[5, 6] == CONCEPT_ID["square"]
    assert patch[7, 0] == 0
    assert token[3, 0] == 0
    assert labels.side.reshape(4, 4, 2)[1, 0].tolist() == [0, 0]
    assert labels.side.reshape(4, 4, 2)[2, 3].tolist() == [1, 1]
    assert labels.color.reshape(4, 4)[2, 3] == 1
    assert labels.color.reshape(4, 4)[1, 0] == IGNORE
    assert labels.home.sum() == 2


def test_the_thumbnail_is_labelled_last_and_alone_knows_sides(rng):
    scene = two_items(rng, size=(230, 112))
    labels = label([scene], (2, 1), 112)
    assert labels.patch.shape == (3, 64)
    assert CONCEPT_ID["dog"] in labels.patch[0]
    assert CONCEPT_ID["dog"] not in labels.patch[1]
    assert CONCEPT_ID["dog"] in labels.patch[2]
    assert (labels.side[:2] == IGNORE).all()
    assert (labels.side[2] != IGNORE).any()


def test_every_grid_gets_pictures_that_the_tiling_rule_cuts_so(rng):
    for grid in {**MOSTLY_SQUARE, **MOSTLY_LONG}:
        size = batches.picture_size(rng, grid)
        assert batches.POLICY.grid(*size) == grid
        tiles = to_tiles(Image.new("RGB", size), batches.POLICY)
        assert len(tiles) == batches.tile_total(grid)


@pytest.mark.parametrize("delta", [1.0, 0.25, 1 / 256])
@pytest.mark.parametrize("tiles", [1, 3])
def test_rows_take_the_prompt_positions_of_the_library(tokenizer, delta, tiles):
    rows = RowBuilder(tokenizer, tokens_per_tile=16)
    ids = rows.prefix(tiles) + rows.question("Where is the dog?")
    ours = visual_positions(ids, rows.image_id, delta)
    theirs = library_positions.visual_positions(ids, rows.image_id, delta)
    assert ours == theirs.tolist()
    assert DELTAS == library_positions.DELTAS


def test_questions_that_share_a_picture_are_answered_as_if_asked_alone(tokenizer):
    torch.manual_seed(1)
    model, rows = InternVL(TINY).eval(), RowBuilder(tokenizer, TINY.tokens_per_tile)
    visual = model.see(torch.randn(1, 3, 112, 112))[1]
    asked = [
        Question("name", "What is this?", "dog"),
        Question("where", "Find the dog.", "top left"),
    ]
    shared = hidden(model, rows, visual, asked)
    for number, question in enumerate(asked):
        alone = hidden(model, rows, visual, [question])
        torch.testing.assert_close(shared[number], alone[0], rtol=1e-5, atol=1e-5)


def hidden(model, rows, visual, questions):
    """Give each question's hidden states at its answer's tokens."""
    ids, targets, positions, owners = rows.row(1, questions, 0.25, conversation=False)
    built = torch.tensor(owners)
    seen = (built[None, :] == 0) | (built[None, :] == built[:, None])
    mask = torch.zeros(seen.shape).masked_fill_(~(seen & torch.ones_like(seen).tril()), -torch.inf)
    at = torch.tensor(positions, dtype=torch.float32)[None]
    out = model.read(torch.tensor(ids)[None], visual, rows.image_id, at, mask)[0]
    return [out[(built == n) & (torch.tensor(targets) >= 0)] for n in range(1, len(questions) + 1)]


def test_conversations_are_plain_causal_rows(tokenizer):
    rows = RowBuilder(tokenizer, 16)
    asked = [Question("name", "What is this?", "dog"), Question("count", "How many dogs?", "1")]
    ids, targets, positions, owners = rows.row(1, asked, 1.0, conversation=True)
    assert not owners.any()
    assert positions.tolist() == list(range(len(ids)))
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert "dog<|im_end|>\n<|im_start|>user\nHow many dogs?<|im_end|>" in text
    assert tokenizer.decode(targets[targets >= 0].tolist(), skip_special_tokens=True) == "dog1"


def test_pixel_shuffle_keeps_row_column_channel_order():
    x = torch.arange(32).view(1, 4, 4, 2)
    assert pixel_shuffle(x)[0, 0, 1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert pixel_shuffle(x)[0, 1, 0].tolist() == [16, 17, 18, 19, 24, 25, 26, 27]


def test_muon_updates_are_orthogonal():
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonal(torch.randn(40, 24)))
    assert singular.min() > 0.5
    assert singular.max() < 1.4


def test_the_rate_ramps_holds_and_falls_to_zero():
    factors = [rate(step, warmup=4, decay_from=6, steps=10) for step in (0, 3, 5, 6, 8, 10)]
    assert factors == [0.25, 1.0, 1.0, 1.0, 0.5, 0.0]


def test_training_and_evaluation_never_share_a_seed():
    assert batches.TRAINING_SEED != heldout.EVALUATION_SEED


def test_held_out_items_are_the_same_each_time_and_balanced():
    column = heldout.COLUMNS["square"]
    asked, again = heldout.items("where", column, 8), heldout.items("where", column, 8)
    assert [item.question for item in asked] == [item.question for item in again]
    assert sorted(item.question.answer for item in asked) == sorted(2 * list(QUADRANTS))
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(asked, again, strict=True))


def test_the_unseen_columns_differ_from_training_in_what_they_draw_from():
    assert not set(scenes.UNSEEN_STYLE.styles) & set(SEEN.styles)
    assert not set(scenes.UNSEEN_PLACE.faces) & set(SEEN.faces)
    assert scenes.UNSEEN_PLACE.unseen_background
    assert not SEEN.unseen_background


def test_the_export_has_the_original_layout(tmp_path, tokenizer):
    from safetensors.torch import load_file

    model = InternVL(replace(TINY, vocab_size=tokenizer.get_vocab_size()))
    export.export(model, tokenizer, tmp_path, dtype="float16", trained=False)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["vision_model.encoder.layers.0.attn.qkv.weight"].shape == (72, 24)
    assert tensors["vision_model.embeddings.patch_embedding.weight"].shape == (24, 3, 14, 14)
    assert tensors["mlp1.1.weight"].shape == (48, 96)
    assert tensors["language_model.model.layers.1.self_attn.k_proj.bias"].shape == (16,)
    assert tensors["language_model.lm_head.weight"].dtype == torch.float16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["demo_trained"] is False
    assert (
        TilePolicy(config["force_image_size"], max_tiles=config["max_dynamic_patch"])
        == batches.POLICY
    )
