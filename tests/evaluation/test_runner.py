"""An evaluation from its first answer to its result; interrupted, resumed, refused."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from fixtures.eval_data import own_file, write_jsonl

from internvl3_mlx.errors import DataError, UserError, WriteError
from internvl3_mlx.evaluation.items import Entry, EvalItem, select_items
from internvl3_mlx.evaluation.judge import TextJudge, judge_prompt, read_judgment
from internvl3_mlx.evaluation.runner import (
    EvalEnd,
    EvalProgress,
    EvalStarted,
    Evaluation,
    ItemFailed,
)
from internvl3_mlx.evaluation.setup import EvalOptions, make_evaluation, plan_evaluation


@pytest.fixture
def data(tmp_path):
    return own_file(tmp_path)


def evaluation(vlm, data, folder, *, batch_size=2, **options):
    plan = plan_evaluation(EvalOptions(task=str(data), max_tokens=4, **options))
    return make_evaluation(plan, vlm, folder=folder, batch_size=batch_size)


def end(events):
    *_, last = events
    assert isinstance(last, EvalEnd)
    return last.result


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_byte(vlm, data, tmp_path):
    whole = end(evaluation(vlm, data, tmp_path / "whole").run())
    events = evaluation(vlm, data, tmp_path / "cut").run()
    for event in events:
        if isinstance(event, EvalProgress) and event.done == 4:
            break
    events.close()
    with (tmp_path / "cut" / "predictions.jsonl").open("ab") as file:
        file.write(b'{"id": "q4", "text": "half of a li')
    resumed = list(evaluation(vlm, data, tmp_path / "cut").run())
    assert resumed[0] == EvalStarted(7, 4)
    assert end(resumed).score == whole.score
    for name in ("predictions.jsonl", "scores.jsonl", "settings.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_batch_that_was_half_written_is_answered_again(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run", batch_size=3).run())
    path = tmp_path / "run" / "predictions.jsonl"
    complete = path.read_bytes()
    path.write_bytes(b"".join(complete.splitlines(keepends=True)[:5]))
    events = list(evaluation(vlm, data, tmp_path / "run", batch_size=3).run())
    assert events[0] == EvalStarted(7, 3)
    assert path.read_bytes() == complete


def test_batches_do_not_change_answers(vlm, data, tmp_path):
    for size in (1, 3, 8):
        end(evaluation(vlm, data, tmp_path / str(size), batch_size=size).run())
    files = [(tmp_path / str(size) / "predictions.jsonl").read_bytes() for size in (1, 3, 8)]
    assert files[0] == files[1] == files[2]


def test_a_complete_run_asks_nothing_again(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run").run())
    again = list(evaluation(vlm, data, tmp_path / "run").run())
    assert again[0] == EvalStarted(7, 7)
    assert not any(isinstance(event, EvalProgress) for event in again)


def test_other_settings_are_refused_by_name(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run").run())
    other = evaluation(vlm, data, tmp_path / "run", prompt="{question} Briefly.")
    with pytest.raises(UserError, match=r"other settings: .*Briefly.*pass --overwrite"):
        end(other.run())
    other.overwrite = True
    assert end(other.run()).score.n == 7
    with pytest.raises(UserError) as refused:
        end(evaluation(vlm, data, tmp_path / "run", limit=3).run())
    told = "limit was none and is 3; prompt was '{question} Briefly.' and is '{question}'"
    assert {*told.split("; ")} == {
        *str(refused.value).partition(": ")[2].partition(". ")[0].split("; ")
    }


def test_changed_data_are_refused(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run").run())
    data.write_text(data.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match="settings: the data were changed. Name"):
        end(evaluation(vlm, data, tmp_path / "run").run())


def test_a_folder_with_other_files_is_left_alone(vlm, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    run = evaluation(vlm, data, tmp_path / "run")
    run.overwrite = True
    with pytest.raises(WriteError, match="not part of an evaluation: thesis.txt"):
        end(run.run())


def test_damaged_predictions_are_named(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run").run())
    for content in ("{]\n", '{"name": "x"}\n'):
        (tmp_path / "run" / "predictions.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"predictions.jsonl is damaged .* --overwrite"):
            end(evaluation(vlm, data, tmp_path / "run").run())


def test_an_unreadable_image_counts_as_wrong_and_is_named(vlm, data, tmp_path):
    (tmp_path / "3.png").write_bytes(b"no picture")
    events = list(evaluation(vlm, data, tmp_path / "run").run())
    (failed,) = [event for event in events if isinstance(event, ItemFailed)]
    assert failed.id == "q3"
    assert "3.png" in failed.error
    result = end(events)
    assert (result.errors, result.score.n) == (1, 7)
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").open()]
    assert rows[3]["score"] == 0
    assert "3.png" in rows[3]["error"]


def test_the_result_has_everything_it_depends_on(vlm, data, tmp_path):
    end(evaluation(vlm, data, tmp_path / "run").run())
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    for key in ("model", "weights", "metric", "parser", "prompt", "prompt_digest", "max_tokens",
                "n", "score", "interval_95", "interval_method", "tokens_per_second",
                "peak_memory_gb", "versions", "data", "seed", "judge"):  # fmt: skip
        assert key in content, key
    low, high = content["interval_95"]
    assert low <= content["score"] <= high
    assert content["versions"]["mlx"] != "not installed"


class Listed:
    def __init__(self, categories, group=1):
        self.entries = [
            Entry(n, str(n), category, f"{category}{n // group}" if group > 1 else "")
            for n, category in enumerate(categories)
        ]


def test_a_limit_takes_each_category_by_its_share():
    source = Listed("a" * 60 + "b" * 30 + "c" * 10)
    chosen = select_items(source, 20, seed=3).entries
    assert Counter(entry.category for entry in chosen) == {"a": 12, "b": 6, "c": 2}
    assert all(one.number < two.number for one, two in pairwise(chosen))
    assert chosen == select_items(source, 20, seed=3).entries
    assert chosen != select_items(source, 20, seed=4).entries
    assert len(select_items(source, 1000, seed=0).entries) == 100


def test_a_limit_keeps_groups_whole():
    chosen = select_items(Listed("a" * 20, group=2), 7, seed=0).entries
    assert len(chosen) == 6
    assert all(count == 2 for count in Counter(entry.group for entry in chosen).values())


def test_a_judge_reads_what_the_rules_cannot(vlm, tmp_path):
    rows = [{"id": str(n), "question": "Which?", "A": "cat", "B": "dog", "answer": "B"}
            for n in range(3)]  # fmt: skip
    path = write_jsonl(tmp_path / "MMStar.jsonl", rows)
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return "The option is: B" if len(asked) == 1 else "Z"

    def run():
        plan = plan_evaluation(EvalOptions(task="mmstar", data=str(path), max_tokens=3))
        made = make_evaluation(plan, vlm, folder=tmp_path / "run", judge="none")
        made.judge = TextJudge("fake", reply)
        made.settings = replace(made.settings, judge="fake")
        return end(made.run())

    result = run()
    assert len(asked) == 3
    assert "Options:\nA. cat\nB. dog\n" in asked[0]
    assert result.to_dict()["judge"] == "fake"
    assert (result.judged, result.unread) == (3, 2)
    assert result.score.value == pytest.approx(100 / 3)
    run()
    assert len(asked) == 3  # judgments are kept, too


def test_judgments_are_read_by_the_kind_of_question():
    yes = EvalItem("1", "Is it?", ("yes",))
    assert "yes, no or unknown" in judge_prompt(yes, "hallusion", "It seems so")
    assert read_judgment(yes, "hallusion", "Yes.") == "yes"
    assert read_judgment(yes, "hallusion", "unknown") is None
    assert "Copy the final value" in judge_prompt(yes, "mathvista", "It is 4")
    assert read_judgment(yes, "mathvista", "4\nbecause") == "4"
    assert read_judgment(yes, "mathvista", " ") is None


def test_circular_evaluation_asks_every_rotation(vlm, tmp_path):
    rows = [{"index": n, "question": "Which?", "A": "cat", "B": "dog", "C": "ox", "answer": "B"}
            for n in range(2)]  # fmt: skip
    path = write_jsonl(tmp_path / "mmb.jsonl", rows)
    plan = plan_evaluation(EvalOptions(task="mmbench", data=str(path), max_tokens=2))
    result = end(make_evaluation(plan, vlm, folder=tmp_path / "r", judge="none").run())
    assert result.score.n == 6
    ids = [json.loads(line)["id"] for line in (tmp_path / "r" / "predictions.jsonl").open()]
    assert ids == ["0", "0+1", "0+2", "1", "1+1", "1+2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chartqa"}, r"no data for ChartQA: pass --data with VLMEvalKit's ChartQA_TEST"),
        ({"task": "own.jsonl", "data": "x.tsv"}, "give one of them"),
        ({"task": "nothing.tsv"}, "no such file or folder"),
        ({"task": "chartqa", "preset": "helm", "data": "x.tsv"}, "unknown preset 'helm'"),
    ],
)
def test_mistakes_are_named_before_a_model_loads(options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("LMUData", str(tmp_path))
    with pytest.raises(UserError, match=message):
        plan_evaluation(EvalOptions(**options))


def test_a_folder_of_a_tasks_name_does_not_hide_the_task(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chartqa").mkdir()
    data = write_jsonl(tmp_path / "c.jsonl", [{"question": "How many?", "answer": "3"}])
    plan = plan_evaluation(EvalOptions(task="chartqa", data=str(data)))
    assert plan.task.name == "chartqa"


def test_vlmevalkits_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("LMUData", str(tmp_path))
    (tmp_path / "ChartQA_TEST.tsv").write_text("index\tquestion\tanswer\n1\tHow many?\t3\n")
    assert len(plan_evaluation(EvalOptions(task="chartqa")).items) == 1


def test_the_next_images_are_read_while_a_batch_is_answered(vlm, data, tmp_path, monkeypatch):
    prepare, answer, begun, sizes = Evaluation.prepare, Evaluation.answer, [], []

    def preparing(self, item):
        begun.append(item.id)
        return prepare(self, item)

    def answering(self, questions):
        sizes.append(len(questions))
        needed = min(len(sizes) * 2 + 1, 7)
        deadline = time.monotonic() + 20
        while len(begun) < needed and time.monotonic() < deadline:
            time.sleep(0.005)
        assert needed <= len(begun) <= len(sizes) * 2 + 2  # of the next batch, and no further
        return answer(self, questions)

    monkeypatch.setattr(Evaluation, "prepare", preparing)
    monkeypatch.setattr(Evaluation, "answer", answering)
    whole = evaluation(vlm, data, tmp_path / "run")
    end(whole.run())
    assert begun == [item.id for item in whole.items]
