"""The example's questions are true, its rows are a critic's, and its ways choose as they say."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from examples.best_of_demo import controls, judged, measure, questions, rows
from examples.best_of_demo.measure import COUNTS, WAYS, Candidates, summarize, table
from examples.best_of_demo.plot import draw_plot
from examples.demo_model import batches, heldout
from examples.demo_model.vocabulary import CATEGORIES, NAMES, SHAPES
from internvl3_mlx import load, load_critic
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.prompt.reasoning import critic_question
from internvl3_mlx.test_time_scaling.rollout_questions import read_questions
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.data.schema import parse_record

HERE = Path(questions.__file__).parent


def test_each_task_is_asked_as_often_and_can_be_read(tmp_path):
    found = [*questions.questions(tmp_path, "valid", 8, questions.TASKS)]
    assert Counter(row["task"] for row in found) == dict.fromkeys(questions.TASKS, 2)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert len(read_questions(tmp_path / "q.jsonl")) == 8
    assert questions.SEED not in (batches.TRAINING_SEED, heldout.EVALUATION_SEED)


def test_rows_are_conversations_of_a_critic_without_a_system_turn():
    steps = [{"step": "3", "score": 1.0}], [{"step": "4", "score": 0.0}]
    raw = [
        {"image": f"{n}.png", "question": "How many?", "steps_with_score": steps[n % 3 == 0]}
        for n in range(9)
    ]
    kept = rows.balanced([*map(rows.conversation, raw)], 8)
    parsed = [*map(parse_record, kept)]
    assert Counter(record.messages[-1].text for record in parsed) == {"+": 3, "-": 3}
    assert {record.system for record in parsed} == {""}
    assert "### Question:\n<image>\nHow many?\n\n### Solution" in parsed[0].messages[0].text
    assert rows.balanced([*map(rows.conversation, raw)], 8, matched=True) == []
    both = [{**row, "image": "0.png"} for row in raw]
    assert len(rows.balanced([*map(rows.conversation, both)], 8, matched=True)) == 6
    assert build_config({}, HERE / "critic.yaml").trains_critic


RIGHT = Candidates(
    right=(False, True, True, False, True, False, False, False),
    texts=("a", "b", "b", "c", "b", "d", "e", "f"),
    log_probs=(-1.0, -2.0, -0.5, -3.0, -4.0, -5.0, -6.0, -7.0),
    critic=(0.2, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1),
)


@pytest.mark.parametrize(
    ("way", "chosen"),
    [
        ("greedy", [0, 0, 0, 0]),
        ("random", [0, 0.5, 0.5, 0.375]),
        ("log-probability", [0, 0, 1, 1]),
        ("majority", [0, 0, 1, 1]),
        ("critic", [0, 0, 0, 0]),
        ("any right", [0, 1, 1, 1]),
    ],
)
def test_each_way_chooses_among_the_first_n(way, chosen):
    assert [RIGHT.chosen(way, count) for count in COUNTS] == chosen


def test_figures_tables_and_plot():
    figures = summarize([[RIGHT, RIGHT], [RIGHT, RIGHT]])
    assert figures["ways"]["random"][8]["mean"] == 0.375
    assert figures["right ranked above wrong"] < 0.5
    assert table(figures).count("\n") == 1 + len(WAYS)
    ET.fromstring(draw_plot(figures, COUNTS))


def test_a_question_is_judged(tmp_path):
    row = next(iter(questions.questions(tmp_path, "valid", 1)))
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    [known] = read_questions(tmp_path / "q.jsonl")
    config = GenerationConfig(temperature=1.0, max_tokens=4, seed=0)
    found = measure.judged(load("demo"), load_critic("demo", system=""), known, config)
    assert len(found.texts) == max(COUNTS)
    assert all(0 <= score <= 1 for score in found.critic)


def test_rows_judged_by_rule_hold_a_right_and_a_wrong_answer_to_each_picture(tmp_path):
    found = judged.judged(tmp_path, "valid", 40, questions.TASKS)
    replies: dict[str, list[str]] = {}
    for row in found:
        replies.setdefault(row["image"], []).append(row["conversations"][-1]["value"])
    assert len(replies) == 40
    assert all(sorted(pair) == ["+", "-"] for pair in replies.values())
    assert all((tmp_path / image).is_file() for image in replies)
    assert build_config({}, HERE / "judged.yaml").trains_critic


@pytest.mark.parametrize(
    ("task", "answer"),
    [("count", "3"), ("shape", "star"), ("kind", "fruit"), ("list", "dog, car"), ("list", "crab")],
)
def test_a_wrong_answer_reads_like_a_right_one(task, answer):
    random = np.random.default_rng(0)
    wrong = {judged.wrong_answer(task, answer, random) for _ in range(60)}
    assert answer not in wrong
    assert len(wrong) > 2
    known = {*"1234", *SHAPES, *CATEGORIES, *NAMES}
    assert all(part in known for text in wrong for part in text.split(", "))


def test_controls_show_each_row_its_own_picture_another_and_a_gray_one(tmp_path):
    rows = judged.judged(tmp_path, "valid", 3, ["shape"])
    for number, row in enumerate(rows):
        shown = {
            name: np.asarray(picture(rows, number, tmp_path))
            for name, picture in controls.PICTURES.items()
        }
        own, another, gray = shown.values()
        assert (own == np.asarray(Image.open(tmp_path / row["image"]))).all()
        assert own.shape == another.shape == gray.shape
        assert (own != another).any()
        assert np.unique(gray).tolist() == [128]


@pytest.mark.parametrize("says", [0.9, 0.1])
def test_controls_compare_the_judgment_with_the_row(tmp_path, says):
    rows = judged.judged(tmp_path, "valid", 4, ["count"])
    asked = []

    class Says:
        def open(self, question, images):
            def score(text):
                asked.append(critic_question(f"<image>\n{question}", text))
                return SimpleNamespace(score=says)

            return SimpleNamespace(score=score)

    right = [controls.is_right(Says(), row, Image.new("RGB", (8, 8))) for row in rows]
    replies = [row["conversations"][-1]["value"] for row in rows]
    assert right == [(reply == "+") == (says > 0.5) for reply in replies]
    assert asked == [row["conversations"][1]["value"] for row in rows]
