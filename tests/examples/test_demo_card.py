"""The demo model's card is written from what was measured, and only from that."""

import pytest

from examples.demo_model import heldout, publish

DELTAS = {"1/1": 0.9, "1/256": 0.91}


def table(right=0.95, swapped=0.2, items=200):
    """Give a measured table in which every task of every column has the same figures."""
    scores = {task: {"right": right, "swapped": swapped} for task in heldout.TASKS}
    deltas = {task: DELTAS for task in heldout.TASKS}
    columns = dict.fromkeys(heldout.COLUMNS, scores)
    return {"items": items, **columns, "deltas": {"items": 100, **deltas}}


def test_the_card_says_how_many_pictures_and_tiles_were_measured():
    card = publish.card(table(items=240))
    assert "Accuracy on 240 new pictures" in card
    assert "100 square pictures per task" in card
    line = next(line for line in card.splitlines() if line.startswith("| panorama 3:1 |"))
    assert line.split(" | ")[1] == "4"
    assert line.endswith("| 95% |")


def test_what_misses_the_gate_is_not_told():
    measured = table()
    measured["square"] = measured["square"] | {"at": {"right": 0.89, "swapped": 0.1}}
    told, rest = publish.card(measured).split("## What it cannot do")
    assert "| at | What is at the top left? | 89% | 10% |" in rest
    assert "What is at the top left?" not in told


def test_the_card_of_a_model_that_passes_nothing_can_be_written():
    told, rest = publish.card(table(right=0.4)).split("## What it cannot do")
    assert "| square | 1 | 40% |" in told
    assert "| 1 | 90% |" in told
    assert "| at | What is at the top left? | 40% | 20% |" in rest


def test_icon_sets_and_abilities_are_in_the_card_once_measured():
    assert "Not measured for these weights." in publish.card(table())
    measured = table() | {"tabler, held out": table(right=0.83)["square"]}
    card = publish.card(measured, {"box": {"right": 0.61, "swapped": 0.07}})
    assert "| tabler | 83% (20%) | 83% (20%) | 83% (20%) | 83% (20%) | 83% (20%) | 83% |" in card
    assert "| box | 61% | 7% |" in card
    assert "Not measured" not in card


def test_tables_measured_side_by_side_become_one():
    parts = [
        {"items": 200, "square": {"name": 1}},
        {"items": 200, "square": {"at": 2}, "deltas": {"items": 100, "at": 3}},
    ]
    whole = {"square": {"name": 1, "at": 2}, "deltas": {"items": 100, "at": 3}}
    assert publish.joined(parts) == {"items": 200, **whole}


def test_tables_of_different_sizes_are_refused():
    with pytest.raises(SystemExit, match=r"have \[40, 200\] items a task; measure all with one"):
        publish.joined([{"items": 200}, {"items": 40}])
