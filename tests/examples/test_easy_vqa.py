"""The easy-VQA lesson writes records that training reads, and its configuration is valid."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from examples.easy_vqa import prepare
from internvl3_mlx.training.data.schema import parse_record

RECIPE = Path(prepare.__file__).parent / "recipe.yaml"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stand in for the package: 300 questions for training, nine for the test, three images."""
    paths = {}
    for number in range(3):
        paths[number] = str(tmp_path / f"{number}.png")
        Image.new("RGB", (64, 60), (number, 9, 9)).save(paths[number])

    def questions(count):
        asked = [f"is it {'not ' * (n % 4 == 0)}{n}?" for n in range(count)]
        return asked, ["no"] * count, [n % 3 for n in range(count)]

    fake = SimpleNamespace(
        get_train_questions=lambda: questions(300),
        get_test_questions=lambda: questions(9),
        get_train_image_paths=lambda: paths,
        get_test_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", fake)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    prepare.main()


def test_records_are_read_by_training_and_no_question_is_in_two_parts(
    package, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run(monkeypatch, "--out", out, "--train", 80, "--test", 5)
    counts, questions = {}, {}
    for part in ("train", "balanced", "affirmative", "valid", "test"):
        rows = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
        counts[part] = len(rows)
        questions[part] = {row["conversations"][0]["value"] for row in rows}
        for row in rows:
            record = parse_record(row)
            assert record.messages[1].text == "no"
            assert all((out / name).exists() for name in record.images)
    affirmative = counts.pop("affirmative")
    assert counts == {"train": 80, "balanced": 80, "valid": prepare.VALIDATION, "test": 5}
    assert affirmative == len(questions["affirmative"]) < 80
    assert questions["balanced"] == questions["train"]
    assert questions["affirmative"] == {q for q in questions["train"] if " not " not in q}
    assert questions["affirmative"]
    assert not questions["train"] & questions["valid"]


@pytest.mark.parametrize(
    ("question", "negated"),
    [
        ("is there not a red shape?", True), ("is no circle present?", True),
        ("does the image not contain a teal shape?", True), ("is a brown shape present?", False),
        ("what shape is in the image?", False), ("is there a note?", False),
    ],
)  # fmt: skip
def test_negated_questions_are_told_by_whole_words(question, negated):
    assert prepare.is_negated(question) is negated


def test_yes_and_no_answer_each_question_equally_often_and_nothing_is_lost():
    rows = [("red?", "no", n) for n in range(7)] + [("red?", "yes", 7), ("round?", "yes", 1)]
    rows += [("not red?", "yes", n) for n in range(5)] + [("not red?", "no", n) for n in (5, 6)]
    rows += [("what?", "circle", 1)]
    balanced = prepare.balance(rows)
    counts = Counter((question, answer) for question, answer, _ in balanced)
    assert counts == {
        ("red?", "no"): 7, ("red?", "yes"): 7, ("not red?", "yes"): 5, ("not red?", "no"): 5,
        ("round?", "yes"): 1, ("what?", "circle"): 1,
    }  # fmt: skip
    assert {*balanced} == {*rows}
    repeated = Counter(balanced)["not red?", "no", 5], Counter(balanced)["not red?", "no", 6]
    assert repeated == (3, 2)
    assert balanced != sorted(balanced)
    assert balanced == prepare.balance(rows)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SystemExit, match="pip install --no-deps easy-vqa"):
        run(monkeypatch, "--out", tmp_path)


def test_the_configuration_has_only_known_settings():
    from dataclasses import fields

    from internvl3_mlx.training.config import TrainConfig

    known = {field.name for field in fields(TrainConfig)}
    assert set(yaml.safe_load(RECIPE.read_text())) <= known


def test_the_test_part_can_be_evaluated(package, tmp_path, monkeypatch):
    from internvl3_mlx.evaluation.setup import EvalOptions, plan_evaluation

    run(monkeypatch, "--out", tmp_path / "out", "--test", 5)
    plan = plan_evaluation(EvalOptions(task=str(tmp_path / "out" / "test.jsonl")))
    first = plan.items[0]
    assert len(plan.items) == 5
    assert first.question.startswith("is it ")
    assert first.answers == ("no",)
    assert first.images[0].is_file()
    assert plan.how.metric == "exact"
