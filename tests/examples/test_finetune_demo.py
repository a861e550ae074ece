"""The examples' rows are true and new, and both examples run from data to figures."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.demo_model import batches, heldout
from examples.demo_model.questions import Item
from examples.demo_model.vocabulary import CATEGORIES
from examples.finetune_demo import compare, kinds, measure, pairs
from internvl3_mlx import load
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.events import UpdateDone
from internvl3_mlx.training.run import train

HERE = Path(kinds.__file__).parent


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_corner_is_asked_for_where_one_object_lies_and_the_answer_is_its_kind():
    items = [
        Item("object", "dog", None, 0.2, 0.2),
        Item("object", "bus", None, 0.8, 0.8),
        Item("shape", "star", "red", 0.8, 0.2),
    ]
    asked = dict(kinds.kinds(items, np.random.default_rng(0), ["The {}?"]))
    assert asked == {"The top left?": "animal", "The bottom right?": "vehicle"}


def test_every_kind_comes_as_often_and_the_splits_share_no_picture():
    seen = {}
    for split in kinds.SPLITS:
        asked = [*kinds.balanced(split, 24)]
        counts = Counter(answer for *_, answer in asked)
        assert counts == dict.fromkeys(CATEGORIES, 4)
        seen[split] = {pixels.tobytes() for pixels, *_ in asked}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))
    assert kinds.SEED not in (batches.TRAINING_SEED, heldout.EVALUATION_SEED)


def test_a_question_is_of_the_words_it_should_be():
    words = {text for _, text, _ in islice(kinds.stream("train", ["In the {}?"]), 20)}
    assert words <= {f"In the {place}?" for place in kinds.QUADRANTS}
    assert len(words) == 4


def test_pairs_are_right_and_wrong_answers_that_were_given():
    said = ["animal", "dog", "dog", "pig", "plant", "pig", "dog"]
    assert [*pairs.paired(said, "animal")] == [("animal", "dog"), ("animal", "pig")]
    assert [*pairs.paired(["dog", "pig"], "animal")] == []
    assert [*pairs.paired(["animal"] * 8, "animal")] == []


@pytest.mark.parametrize("name", ["kinds", "preference"])
def test_an_example_runs_from_its_data_to_its_figure(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    if name == "kinds":
        for split, rows in (("train", 6), ("valid", 6), ("test", 6)):
            kinds.write(data, split, rows)
    else:
        pairs.write_pairs(load("demo"), data, 4)
        kinds.write(data, "fresh", 6, pairs.WORDINGS)
        for row in rows_of(data / "train.jsonl"):
            assert row["chosen"] in CATEGORIES
            assert row["rejected"] != row["chosen"]
            assert Image.open(data / row["image"]).size == (112, 112)
    where = {"data": str(data), "adapter_path": str(tmp_path / "adapter")}
    tiny = {"iters": 1, "epochs": 1, "batch_size": 2, "save_every": 1, "steps_per_eval": 1}
    recipe = build_config({**tiny, **where}, HERE / f"{name}.yaml")
    [update] = [event for event in train(recipe) if isinstance(event, UpdateDone)]
    assert update.grad_norm > 0
    questions = data / {"kinds": "test.jsonl", "preference": "fresh.jsonl"}[name]
    arguments = [str(questions), "--adapter", where["adapter_path"], "--wrong", "1"]
    monkeypatch.setattr("sys.argv", ["measure", *arguments])
    measure.main()
    told = capsys.readouterr().out.splitlines()[-1]
    right = int(told.split()[0])
    assert told == f"{right} of 6 right: {right / 6:.1%}"


def test_methods_are_compared_on_the_same_questions_and_what_is_known_stays(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare, "CANDIDATES", 3)
    monkeypatch.setattr(compare, "METHODS", {"GRPO": ("rewards", ("--epochs", "1"))})
    data = tmp_path / "pairs"
    pairs.write_pairs(load("demo"), data, 2)
    kinds.write(data, "fresh", 6, pairs.WORDINGS)
    assert {row["image"] for row in rows_of(data / "questions.jsonl")} == {
        row["image"] for row in rows_of(data / "train.jsonl")
    }
    monkeypatch.setattr("sys.argv", ["compare", str(data), "--seeds", "1"])
    compare.main()
    told = capsys.readouterr().out
    assert [path.name for path in (data / "runs").iterdir()] == ["rewards-epochs1-0"]
    runs = {run["method"]: run for run in rows_of(data / "runs.jsonl")}
    assert {*runs} == {"the demo", "GRPO", *compare.BEST_OF, "any of 8 right"}
    assert runs["GRPO"]["cpu"] > 0
    assert all(runs[name]["right"] <= runs["any of 8 right"]["right"] for name in compare.BEST_OF)
    greedy = [
        said == wanted for _, wanted, said in measure.asked(load("demo"), data / "fresh.jsonl")
    ]
    assert runs["the demo"]["right"] == np.mean(greedy)
    monkeypatch.setattr(compare, "carry_out", None)  # nothing is measured again
    compare.main()
    assert capsys.readouterr().out == told
