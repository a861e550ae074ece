"""Answers generated at validation, and the report of a run."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from fixtures.records import chat_record, pair_record, write_image, write_jsonl
from fixtures.train_sessions import select, small_session, small_setup, write_data
from PIL import Image

from internvl3_mlx import load
from internvl3_mlx.errors import UserError
from internvl3_mlx.training.answer_samples import (
    ANSWER_METRICS,
    build_question,
    read_samples,
    readable_question,
)
from internvl3_mlx.training.config_fields import ANSWER_METRICS as NAMES
from internvl3_mlx.training.events import ValidationDone
from internvl3_mlx.training.html_report import png_bytes
from internvl3_mlx.training.loggers import METRICS_FILE, read_metrics
from internvl3_mlx.training.run import run_session

SETTINGS = {"iters": 4, "steps_per_eval": 2, "eval_metric": "anls", "eval_samples": 2}


def test_metrics_by_name_are_those_of_the_benchmarks():
    assert {*ANSWER_METRICS} == {*NAMES}
    assert ANSWER_METRICS["exact"](" Cat ", "cat") == 1
    assert ANSWER_METRICS["relaxed"]("104", "100") == 1
    assert ANSWER_METRICS["relaxed"]("106", "100") == 0
    assert ANSWER_METRICS["anls"]("12.4O", "12.40") == pytest.approx(0.8)
    assert ANSWER_METRICS["iou"]("[[0, 0, 500, 1000]]", "[[0, 0, 1000, 1000]]") == 0.5


def test_answers_are_generated_before_and_during_a_run_and_scored(tmp_path):
    write_data(tmp_path / "data", 6, 3)
    here = small_session(tmp_path, **SETTINGS)
    validations = select(run_session(here), ValidationDone)
    samples = read_samples(here.folder)
    assert [sorted(sample.answers) for sample in samples] == [["0", "2", "4"]] * 2
    for validation in validations:
        scores = [sample.scores[str(validation.update)] for sample in samples]
        assert validation.metrics["answer_anls"] == pytest.approx(np.mean(scores))
    rows = read_metrics(here.folder / METRICS_FILE)
    assert rows[3]["val_answer_anls"] == validations[1].metrics["answer_anls"]
    assert samples[1].expected == "dog dog"
    before = load("demo", dtype="float32").ask(
        "<image>\nWho is it??", [tmp_path / "data" / "1.png"], max_tiles=1, max_tokens=44
    )
    assert samples[1].answers["0"] == before.text.strip()


def test_sampling_changes_nothing_of_what_is_learned(tmp_path):
    write_data(tmp_path / "data", 6, 2)
    settings = {**SETTINGS, "lora_dropout": 0.1}
    one = small_session(tmp_path, **settings)
    other = small_session(
        tmp_path, **(settings | {"eval_metric": None}), adapter_path=str(tmp_path / "other")
    )
    for here in (one, other):
        assert len([*run_session(here)])
    for name, weight in one.state.weights.items():
        assert np.array_equal(np.array(weight), np.array(other.state.weights[name])), name


def test_the_report_is_one_page_with_plot_samples_settings_and_cost(tmp_path):
    write_data(tmp_path / "data", 5, 2)
    write_image(tmp_path / "data" / "x.png", 90, 60, 3)
    rows = [chat_record("<image>\nIs 1 < 2?", "<b>yes</b>", images=["x.png"]), chat_record()]
    write_jsonl(tmp_path / "data" / "valid.jsonl", rows)
    here = small_session(tmp_path, **SETTINGS)
    assert [*run_session(here)]
    text = (here.folder / "report.html").read_text("utf-8")
    assert "<pre>Is 1 &lt; 2?</pre>" in text
    assert '<meta name="viewport"' in text
    assert text.count('<td data-name="expected">') == 2
    assert "&lt;b&gt;yes&lt;/b&gt;" in text
    assert "<b>" not in text
    for shown in ("4 of 4", "learning_rate", "update 0", "update 4", "peak memory"):
        assert shown in text
    ET.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL)[0])
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    [image] = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (112, 112)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<img></img>\nWho?<|im_end|>\n"
         "<|im_start|>assistant\n", "Who?"),
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
         "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
         "user: One?\nassistant: 1\nuser: Two?"),
        ("Once upon", "Once upon"),
    ],
)  # fmt: skip
def test_a_question_is_shown_as_a_person_wrote_it(prompt, asked):
    assert readable_question(prompt) == asked


def test_a_png_holds_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))), pixels)


def test_questions_end_before_the_last_answer(tmp_path):
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_jsonl(tmp_path / "data" / "train.jsonl", [record])
    setup = small_setup(tmp_path)
    question = build_question(setup.train_dataset, 0)
    tokenizer = setup.preprocessor.tokenizer
    assert tokenizer.decode([*question.expected_ids][:-1]) == "2"
    text = tokenizer.decode(question.inputs.token_ids)
    assert "One?" in text
    assert "Two?" in text
    assert len(question.inputs.positions) == len(question.inputs.token_ids)
    write_jsonl(tmp_path / "data" / "train.jsonl", [pair_record("Who?", "cat", "dog")])
    pair = build_question(small_setup(tmp_path, method="mpo").train_dataset, 0)
    assert tokenizer.decode([*pair.expected_ids][:-1]) == "cat"
    write_jsonl(
        tmp_path / "data" / "train.jsonl", [{"prompt": "Who?", "completion": "dog", "label": True}]
    )
    rated = build_question(small_setup(tmp_path, method="kto").train_dataset, 0)
    assert tokenizer.decode([*rated.expected_ids][:-1]) == "dog"


def test_a_metric_needs_validation_data(tmp_path):
    write_data(tmp_path / "data", 3)
    with pytest.raises(UserError, match="eval_metric need validation data"):
        small_setup(tmp_path, eval_metric="exact")
    assert json.dumps(SETTINGS)
