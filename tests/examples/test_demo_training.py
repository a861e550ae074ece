"""Training the demo model: a run resumes exactly, and goes on from what was published."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fixtures.tiny_demo import TINY

from examples.demo_model import batches, choosing, export, train
from examples.demo_model.model import InternVL
from examples.demo_model.questions import Question
from examples.demo_model.rows import DELTAS, draw_delta
from examples.demo_model.sprites import SpriteBank
from examples.demo_model.stages import ONE, STAGES, Lessons
from examples.demo_model.tokenizer import learn


@pytest.fixture(scope="module")
def tokenizer():
    return learn()


@pytest.fixture
def small_job(monkeypatch, tmp_path, tokenizer):
    """Give a job of three pictures a step over a model of a few thousand parameters."""
    monkeypatch.setattr(batches, "SpriteBank", partial(SpriteBank, variants=1))
    monkeypatch.setattr(SpriteBank, "SIDES", (30, 60))
    monkeypatch.setattr(train, "DemoConfig", lambda vocab: replace(TINY, vocab_size=vocab))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 4, "decay_from": 2}))
    return train.Job("ask", tmp_path, None, "cpu", 1, 3)


def test_a_resumed_run_equals_one_that_was_never_stopped(small_job):
    straight = train.Trainer(small_job, rank=0)
    figures = [f for _, f in straight.steps()]
    assert len(figures) == 4
    first = train.Trainer(small_job, rank=0)
    for step, _ in first.steps():
        if step == 2:
            first.save(step)
            break
    second = train.Trainer(small_job, rank=0)
    second.load()
    assert [step for step, _ in second.steps()] == [3, 4]
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_run_goes_on_from_a_published_checkpoint(small_job, tmp_path, tokenizer):
    published = tmp_path / "published"
    torch.manual_seed(4)
    model = InternVL(replace(TINY, vocab_size=tokenizer.get_vocab_size()))
    export.export(model, tokenizer, published, dtype="float32", trained=True)
    trainer = train.Trainer(replace(small_job, stage="widen", start=published), rank=0)
    trainer.load()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=0, atol=0)
    (step, figures), *_ = trainer.steps()
    assert step == 1
    assert torch.isfinite(figures).all()


def test_fresh_heads_pass_nothing_back_to_a_trained_tower(small_job, tmp_path, tokenizer):
    published = tmp_path / "published"
    model = InternVL(replace(TINY, vocab_size=tokenizer.get_vocab_size()))
    export.export(model, tokenizer, published, dtype="float32", trained=True)
    trainer = train.Trainer(replace(small_job, stage="widen", start=published), rank=0)
    trainer.load()
    patches = torch.randn(2, 8, 8, TINY.vision_width, requires_grad=True)
    trainer.heads.patch(patches).logsumexp(-1).sum().backward()
    assert not patches.grad.any()


def test_widening_draws_mostly_long_and_large_pictures():
    lessons = {name: stage.lessons for name, stage in STAGES.items()}
    for each in lessons.values():
        assert sum(each.grids.values()) == pytest.approx(1)
    square = {name: each.grids[ONE] * (1 - each.squashed) for name, each in lessons.items()}
    assert square["ask"] > 0.5 > square["widen"] > 0.2


def test_long_pictures_are_shown_whole_in_one_tile(monkeypatch):
    monkeypatch.setattr(batches, "SpriteBank", partial(SpriteBank, variants=1))
    monkeypatch.setattr(SpriteBank, "SIDES", (30, 60))
    lessons = Lessons({ONE: 1 - 1e-9, (3, 1): 1e-9}, {}, squashed=1.0)
    maker = batches.BatchMaker(None, lessons, rank=0, pictures=4)
    batch = maker.make(0)
    assert batch.tiles.shape == (4, 1, 112, 112, 3)
    assert batch.labels.token.shape == (4, 16)
    random = np.random.default_rng(0)
    assert {batches.POLICY.grid(*maker.size(random, ONE)) for _ in range(9)} == {(3, 1)}


def test_a_share_of_the_rows_keeps_delta_one():
    draws = [draw_delta(np.random.default_rng(seed), 0.5) for seed in range(400)]
    assert set(draws) == set(DELTAS)
    assert 0.45 < np.mean([delta == 1 for delta in draws]) < 0.65


def test_a_stage_asks_more_often_what_it_gives_weight():
    question = Question("count_all", "Count everything.", "3")
    asked = {name: choosing.weight(question, STAGES[name].lessons.tasks) for name in STAGES}
    assert asked["widen"] > asked["ask"]
