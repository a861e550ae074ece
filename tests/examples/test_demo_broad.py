"""The demo model's broad training: styles differ, answers follow from what is drawn."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fixtures.tiny_demo import TINY

from examples.demo_model import (
    batches,
    broad,
    charts,
    drawing_bank,
    heldout,
    sprites,
    stylize,
    train,
)
from examples.demo_model.abilities import ABILITIES, is_right, make_trials
from examples.demo_model.camera import spoil
from examples.demo_model.drawings import Drawing, save_drawings
from examples.demo_model.heldout import drawer
from examples.demo_model.icon_sets import DEVELOPMENT_SETS, HELD_OUT_SETS, TRAIN_SETS, base_name
from examples.demo_model.labels import IGNORE, label
from examples.demo_model.pairs_of_images import changed_pair
from examples.demo_model.questions import ask, box_questions, follow_ups
from examples.demo_model.rows import RowBuilder
from examples.demo_model.scenes import SEEN, Cell, Look, Thing, draw
from examples.demo_model.sprites import atlas
from examples.demo_model.stages import STAGES
from examples.demo_model.tokenizer import learn
from examples.demo_model.vocabulary import NAMES, OBJECTS
from examples.demo_model.writing import plan_lines


@pytest.fixture(scope="module")
def tokenizer():
    return learn()


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def material(tmp_path):
    """Give drawings as the icon packages would, taken from the atlas in the repository."""
    drawings = [
        Drawing("noto", name, np.asarray(atlas()["noto", name].resize((88, 88)))) for name in NAMES
    ]
    save_drawings(tmp_path / "drawings.npz", drawings)
    return tmp_path / "drawings.npz"


def test_sets_for_training_for_choices_and_for_the_end_share_nothing():
    groups = [set(TRAIN_SETS), set(DEVELOPMENT_SETS.values()), set(HELD_OUT_SETS.values())]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert {"twemoji", "openmoji", "tabler"} <= groups[2]


@pytest.mark.parametrize(
    ("icon", "name"),
    [("bell-outline-24", "bell"), ("fish", "fish"), ("book-open-filled", "book-open")],
)
def test_icons_are_known_without_the_ending_of_their_variant(icon, name):
    assert base_name(icon) == name


@pytest.mark.parametrize(
    "style", [style for style, _ in (*stylize.COLOR_STYLES, *stylize.ICON_STYLES)]
)
def test_every_style_changes_a_drawing_and_keeps_its_place(style, rng):
    pixels = np.asarray(atlas()["noto", "dog"].resize((88, 88)))
    drawn = style(pixels, rng)
    assert drawn.shape == pixels.shape
    assert drawn.dtype == np.uint8
    assert not np.array_equal(drawn, pixels)
    inked, before = drawn[..., 3] > 60, pixels[..., 3] > 60
    assert inked.any()
    if style is not stylize.badge:  # a badge is larger than what it shows
        rows, columns = np.nonzero(inked)
        was_rows, was_columns = np.nonzero(before)
        assert abs(rows.min() - was_rows.min()) <= 8
        assert abs(columns.max() - was_columns.max()) <= 8


def test_a_filling_covers_what_lines_enclose_and_nothing_outside():
    ring = np.zeros((60, 60), np.uint8)
    y, x = np.indices(ring.shape)
    distance = np.hypot(x - 30, y - 30)
    ring[(distance > 18) & (distance < 22)] = 255
    filled = stylize.enclosed(ring)
    assert filled[30, 30] == 255
    assert filled[2, 2] == 0
    assert np.abs((filled > 0).sum() - (distance < 22).sum()) < 200


def test_a_box_covers_what_was_drawn(rng):
    plan = [
        (Thing("object", "dog"), Cell(40, 30, 50)),
        (Thing("shape", "star", "red"), Cell(120, 60, 41)),
    ]
    scene = draw(rng, (160, 90), plan, SEEN, drawer(SEEN))
    for number, item in enumerate(scene.items, start=1):
        rows, columns = np.nonzero(scene.owner == number)
        x0, y0, x1, y1 = (
            side * length for side, length in zip(item.box, (160, 90, 160, 90), strict=True)
        )
        assert x0 <= columns.min() <= x0 + 3
        assert y1 - 4 <= rows.max() <= y1
        assert x1 - 4 <= columns.max() <= x1
        assert y0 <= rows.min() <= y0 + 3
    asked = {question.answer for question in box_questions(scene.items, rng)}
    assert len(asked) == 2
    assert all(answer.startswith("<ref>") and answer.endswith("]]</box>") for answer in asked)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<ref>dog</ref><box>[[100, 100, 300, 300]]</box>", True),
        ("dog[[110, 90, 300, 320]]", True),
        ("dog[[300, 300, 500, 500]]", False),
        ("dog", False),
    ],
)
def test_boxes_are_right_when_they_overlap(said, right):
    assert is_right(said, "<ref>dog</ref><box>[[100, 100, 300, 300]]</box>") is right


def test_two_images_differ_where_the_answer_says(rng):
    said = set()
    for _ in range(40):
        before, after, (question,) = changed_pair(rng, SEEN, drawer(SEEN))
        names = [{item.name for item in scene.items} for scene in (before, after)]
        kind = question.answer.split()[-1]
        said.add(kind if kind in ("gone", "new", "nothing") else "became")
        if question.answer == "nothing":
            assert np.array_equal(before.pixels, after.pixels)
        elif kind == "gone":
            assert question.answer == f"the {(names[0] - names[1]).pop()} is gone"
        elif kind == "new":
            assert question.answer == f"the {(names[1] - names[0]).pop()} is new"
        else:
            was, now = names[0] - names[1], names[1] - names[0]
            assert question.answer == f"the {was.pop()} became a {now.pop()}"
    assert said == {"gone", "new", "nothing", "became"}


def test_bars_are_as_high_as_the_answers_say(rng):
    chart = charts.Chart(("red", "blue", "green"), (3, 10, 6))
    scene = charts.paint_chart(rng, chart, (220, 200))
    high = [(scene.owner == number).any(axis=1).sum() for number in (1, 2, 3)]
    assert np.allclose(np.array(high) / high[1] * 10, chart.values, atol=0.2)
    answers = {(q.task, q.answer) for q in charts.chart_questions(chart, rng)}
    assert {("bar", "3"), ("bar", "10"), ("bar", "6"), ("highest", "blue")} <= answers
    assert ("highest", "red") in answers  # the lowest
    labels = label([scene], (1, 1), 112)
    assert set(np.unique(labels.token)) <= {0, IGNORE}
    assert (labels.color > 0).any()


def written_line(rng, size=(112, 112)):
    """Draw four thin characters that fill the width."""
    cell = Cell(size[0] / 2, size[1] / 2, 44)
    return draw(rng, size, [(Thing("word", "ILTV", "black"), cell)], SEEN, drawer(SEEN))


def test_characters_own_their_rectangle_and_are_counted_from_the_left(rng):
    scene = written_line(rng)
    top, bottom = (np.flatnonzero(scene.owner.any(1))[end] for end in (0, -1))
    for part in range(1, 5):
        rows, columns = np.nonzero(scene.owner == part)
        assert (rows.min(), rows.max()) == (top, bottom)
        assert len(rows) == (bottom - top + 1) * (columns.max() - columns.min() + 1)
    labels = label([scene], (1, 1), 112)
    found = labels.order[labels.order != IGNORE]
    assert set(found) == {0, 1, 2, 3}
    across = labels.order.reshape(8, 8)[4]
    assert sorted(across[across != IGNORE]) == across[across != IGNORE].tolist()


def test_only_the_thumbnail_counts_characters_of_a_line_over_two_tiles(rng):
    labels = label([written_line(rng, (230, 112))], (2, 1), 112)
    assert (labels.patch[:2] > 0).any()
    assert (labels.order[:2] == IGNORE).all()
    assert (labels.order[2] != IGNORE).any()


def test_objects_are_not_counted_as_characters(rng):
    scene = draw(rng, (112, 112), [(Thing("object", "dog"), Cell(56, 56, 90))], SEEN, drawer(SEEN))
    labels = label([scene], (1, 1), 112)
    assert (labels.patch > 0).any()
    assert (labels.order < 0).all()


def test_images_of_writing_ask_for_both_lines(rng):
    kinds = set()
    for _ in range(40):
        plan = plan_lines(rng, (224, 112))
        scene = draw(rng, (224, 112), plan, SEEN, drawer(SEEN))
        asked = {q.task: q.answer for q in ask(scene.items, rng)}
        assert all(asked[thing.kind] == thing.name for thing, _ in plan)
        kinds.add(tuple(sorted(thing.kind for thing, _ in plan)))
        for item in scene.items:
            assert 0 <= item.box[0] < item.box[2] <= 1
            assert 0 <= item.box[1] < item.box[3] <= 1
    assert kinds == {("word",), ("number",), ("number", "word")}


def test_second_questions_need_the_first(rng):
    plan = [(Thing("object", "dog"), Cell(30, 22, 42)), (Thing("object", "bus"), Cell(120, 66, 40))]
    scene = draw(rng, (150, 90), plan, SEEN, drawer(SEEN))
    pairs = {
        (first.answer, second.text, second.answer) for first, second in follow_ups(scene.items, rng)
    }
    assert ("yes", "Where is it?", "top left") in pairs
    assert ("top left", "And the bus?", "bottom right") in pairs
    assert ("bus", "What kind of thing is it?", "vehicle") in pairs


def draw_few_sprites(monkeypatch):
    """Fill both banks with one drawing of each object."""
    drawings, atlas_sprites = drawing_bank.DrawingBank, sprites.SpriteBank
    monkeypatch.setattr(sprites.SpriteBank, "SIDES", (48,))
    monkeypatch.setattr(batches, "DrawingBank", partial(drawings, variants=1))
    monkeypatch.setattr(batches, "SpriteBank", partial(atlas_sprites, variants=1))


@pytest.mark.parametrize("kind", broad.BROAD_KINDS)
def test_workers_make_alike_batches_of_every_kind(kind, tokenizer, material, monkeypatch):
    draw_few_sprites(monkeypatch)
    lessons = replace(STAGES["broaden"].lessons, kinds={kind: 1.0})
    shapes = set()
    for rank in (0, 1):
        maker = batches.BatchMaker(
            RowBuilder(tokenizer, 16),
            lessons,
            rank=rank,
            pictures=6,
            material=broad.Material(material, None),
        )
        batch = maker.make(3)
        shapes.add(batch.tiles.shape)
        again = maker.make(3)
        assert np.array_equal(batch.tiles, again.tiles)
        assert len(batch.labels.token) == batch.tiles.shape[0] * batch.tiles.shape[1]
        if kind in ("mosaics", "letters"):
            assert batch.rows is None
            assert (batch.labels.token > 0).sum() > 6
        else:
            images = (batch.rows.ids == tokenizer.token_to_id("<IMG_CONTEXT>")).sum(axis=1)
            assert set(images) == {16 * batch.tiles.shape[1]}
            assert (batch.rows.targets != IGNORE).any(axis=1).all()
    assert len(shapes) == 1


def test_the_stage_trains_and_resumes(tmp_path, tokenizer, material, monkeypatch):
    draw_few_sprites(monkeypatch)
    monkeypatch.setattr(train, "DemoConfig", lambda vocab: replace(TINY, vocab_size=vocab))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 4, "decay_from": 2}))
    job = train.Job("broaden", tmp_path, None, "cpu", 1, 4, drawings=material)
    straight = train.Trainer(job, rank=0)
    assert all(torch.isfinite(figures).all() for _, figures in straight.steps())
    first, second = train.Trainer(job, rank=0), train.Trainer(job, rank=0)
    for step, _ in first.steps():
        if step == 2:
            first.save(step)
            break
    second.load()
    assert [step for step, _ in second.steps()] == [3, 4]
    for name, tensor in straight.model.state_dict().items():
        assert np.array_equal(second.model.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ABILITIES)
def test_abilities_are_asked_the_same_way_each_time(name):
    look = Look(faces=(7,))
    trials, again = make_trials(name, 6, look), make_trials(name, 6, look)
    assert [trial.answer for trial in trials] == [trial.answer for trial in again]
    assert all(len(trial.images) == (2 if name == "what changed" else 1) for trial in trials)
    assert all(len(trial.turns) == (2 if name == "second turn" else 1) for trial in trials)


def test_six_colors_share_twenty_questions_about_the_highest_bar():
    trials = make_trials("highest bar", 20, Look(faces=(7,)))
    assert max(Counter(trial.answer for trial in trials).values()) == 4


def test_columns_of_icon_sets_ask_only_about_what_the_set_draws(monkeypatch, tmp_path):
    drawings = [
        Drawing("tabler", name, np.asarray(atlas()["noto", name].resize((88, 88))))
        for name in NAMES[:20]
    ]
    save_drawings(tmp_path / "drawings.npz", drawings)
    monkeypatch.setenv(heldout.DRAWINGS_VARIABLE, str(tmp_path / "drawings.npz"))
    heldout.icons.cache_clear()
    column = heldout.HELD_OUT_COLUMNS["tabler, held out"]
    asked = heldout.items("name", column, 20)
    assert {item.question.answer for item in asked} == set(NAMES[:20])
    known = {OBJECTS[name].category for name in NAMES[:20]}
    assert len(known) < heldout.TASKS["category"]
    asked = heldout.items("category", column, len(known))
    assert {item.question.answer for item in asked} == known
    heldout.icons.cache_clear()


def test_a_spoiled_image_stays_recognizable(rng):
    pixels = rng.integers(60, 190, (56, 70, 3), dtype=np.uint8)
    spoiled = [spoil(pixels, np.random.default_rng(seed)) for seed in range(30)]
    assert any(not np.array_equal(image, pixels) for image in spoiled)
    assert all(image.shape == pixels.shape and image.dtype == np.uint8 for image in spoiled)
    assert max(np.abs(image.mean() - pixels.mean()) for image in spoiled) < 45
