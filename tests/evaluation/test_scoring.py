"""From an answer to a score: each parser with its metric, and published scores."""

import pytest

from internvl3_mlx.errors import DataError
from internvl3_mlx.evaluation.items import EvalItem, rotate_options
from internvl3_mlx.evaluation.published import published_score
from internvl3_mlx.evaluation.scoring import (
    ItemScore,
    aggregate,
    by_category,
    parse_answer,
    score_answer,
    scored_item,
)
from internvl3_mlx.evaluation.tasks import TASKS

OPTIONS = {"A": "a cat", "B": "a dog"}


def item(**changes):
    return EvalItem(**{"id": "1", "question": "Q?", "answers": ("B",), **changes})


def score(task, preset, asked, text):
    how = TASKS[task].settings_of(preset)
    return score_answer(asked, how.metric, parse_answer(asked, how.parser, text)).score


@pytest.mark.parametrize(
    ("text", "internvl", "vlmevalkit", "lmms"),
    [
        ("B", 1, 1, 1),
        ("B. a dog", 1, 1, 1),
        ("I think it is a dog", 1, 1, 1),
        ("A or B", 0, 0, 1),  # the first character; two letters; the last letter
        ("Because it says so", 1, 0, None),  # a first character by chance; nothing; a guess
    ],
)
def test_mmmu_is_read_otherwise_in_each_harness(text, internvl, vlmevalkit, lmms):
    asked = item(options=OPTIONS)
    assert score("mmmu", "internvl", asked, text) == internvl
    assert score("mmmu", "vlmevalkit", asked, text) == vlmevalkit
    if lmms is not None:
        assert score("mmmu", "lmms", asked, text) == lmms


def test_lmms_guesses_where_it_finds_nothing_and_always_the_same():
    guesses, again = (
        [parse_answer(item(id=str(n), options=OPTIONS), "authors", "no idea") for n in range(40)]
        for _ in range(2)
    )
    assert guesses == again
    assert {*guesses} == {"A", "B"}
    assert parse_answer(item(options=OPTIONS), "rules", "no idea") is None


def test_chartqa_measures_by_another_number():
    asked = item(answers=("100",))
    assert score("chartqa", "internvl", asked, "105.2") == 1
    assert score("chartqa", "vlmevalkit", asked, "105.2") == 0


def test_thinking_is_not_scored():
    assert score("docvqa", "internvl", item(answers=("12",)), "<think>13</think>12") == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [("(b) a dog", "B"), ("B", "B"), ("Answer: B.", "B"), ("", None), ("maybe", None)],
)
def test_mvbench_reads_the_first_word(text, found):
    assert parse_answer(item(options=OPTIONS), "bracketed_letter", text) == found


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("So Answer: 14", "integer", "14"),
        ("14", "integer", "14"),
        ("It is fourteen of them", "integer", None),
        ("Final answer: **3.5**", "float", "3.5"),
    ],
)
def test_mathvista_reads_what_is_stated(text, kind, found):
    assert parse_answer(item(answer_type=kind), "stated", text) == found


def test_formulas_of_ocrbench_have_no_blanks():
    asked = item(answers=("a+b",), kind="HME100k")
    assert score("ocrbench", "internvl", asked, "a + b") == 1
    assert score("ocrbench", "internvl", item(answers=("a+b",)), "a + b") == 0


def test_yes_no_tasks_need_yes_or_no():
    with pytest.raises(DataError, match="item 1: the answer is 'b'; this task needs yes or no"):
        score("mme", "internvl", item(), "yes")


def test_vqa_accuracy_needs_annotators():
    with pytest.raises(DataError, match="item 1: VQA accuracy needs 4"):
        score("textvqa", "internvl", item(), "B")


def test_boxes_and_points():
    asked = item(box=(0.1, 0.2, 0.5, 0.7))
    assert score("refcoco", "internvl", asked, "<box>[[100, 200, 500, 700]]</box>") == 1
    assert score("refcoco", "internvl", asked, "[[600, 700, 900, 900]]") == 0
    assert score("screenspot", "internvl", asked, "[300, 400]") == 1


def test_hallusion_groups_by_the_parts_of_its_index():
    rows = [("VD_chart_0_1_2", 1.0), ("VD_chart_0_1_3", 0.0), ("VD_chart_0_2_2", 1.0)]
    items = [
        scored_item(item(id=name, answers=("yes",)), "hallusion", ItemScore(value, "yes"))
        for name, value in rows
    ]
    # answers 2 of 3; figures: 1 is wrong, 2 is right; questions: 2 is right, 3 is wrong
    assert aggregate("hallusion", items).value == pytest.approx(100 * (2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_circular_needs_every_rotation():
    asked = item(options={"A": "a", "B": "b", "C": "c"})
    turns = [rotate_options(asked, turn) for turn in range(3)]
    assert turns[1].options == {"A": "c", "B": "a", "C": "b"}
    assert [turn.answers for turn in turns] == [("B",), ("C",), ("A",)]
    assert [turn.options[turn.answers[0]] for turn in turns] == ["b"] * 3

    def result(letters):
        pairs = zip(turns, letters, strict=True)
        scored = [scored_item(t, "circular", score_answer(t, "circular", c)) for t, c in pairs]
        return aggregate("circular", scored)

    assert result("BBB").value == 0
    assert (result("BCA").value, result("BCA").n) == (100, 3)


def test_categories_and_scales():
    rows = [("a", 1.0), ("a", 0.0), ("b", 1.0)]
    items = [scored_item(item(category=c), "exact", ItemScore(s, "x")) for c, s in rows]
    assert aggregate("ocrbench", items).value == pytest.approx(2000 / 3)
    assert {name: s.value for name, s in by_category("exact", items).items()} == {"a": 50, "b": 100}
    assert by_category("exact", items[2:]) == {}


@pytest.mark.parametrize(
    ("model", "task", "score"),
    [
        ("2b", "chartqa", 80.2),
        ("OpenGVLab/InternVL3-78B", "mmmu", 72.2),
        ("mlx-community/InternVL3-8B-4bit", "ocrbench", 880),
        ("OpenGVLab/InternVL3_5-4B", "docvqa", 92.4),
        ("OpenGVLab/InternVL3_5-4B", "mmmu", None),
        ("my-model", "mmmu", None),
        ("demo", "mmmu", None),
        ("InternVL3-2Bis", "mmmu", None),
    ],
)
def test_published_scores_are_found_by_name(model, task, score):
    found = published_score(task, model)
    assert (found and found.score) == score
