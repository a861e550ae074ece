"""Each preset asks in its own words, with its own tiles."""

import numpy as np
import pytest
from fixtures.image_files import noise
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.items import EvalItem
from internvl3_mlx.evaluation.prompts import build_request, make_request, render_prompt
from internvl3_mlx.evaluation.scoring import METRICS, PARSERS
from internvl3_mlx.evaluation.tasks import PRESETS, TASKS, find_task
from internvl3_mlx.generation.generation_config import GenerationConfig

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
OPTIONS = {"A": "a cat", "B": "a dog"}


def item(**changes):
    return EvalItem(**{"id": "1", "question": "what is it?", "answers": ("x",), **changes})


@pytest.mark.parametrize(
    ("task", "preset", "expected"),
    [
        ("chartqa", "internvl", f"what is it? {WORD}"),
        ("chartqa", "vlmevalkit", f"what is it?\n{WORD}"),
        ("chartqa", "lmms", "what is it?\nAnswer the question with a single word."),
        ("textvqa", "lmms", f"What is it?\n{WORD}"),
        ("ocrbench", "lmms", "what is it?"),
        ("hallusionbench", "internvl", f"what is it? Please answer yes or no. {WORD}"),
    ],
)
def test_suffixes(task, preset, expected):
    assert render_prompt(item(), TASKS[task].settings_of(preset)) == expected


def test_multiple_choice_with_hint_and_in_chinese():
    how = TASKS["mmbench"].settings_of("internvl")
    text = render_prompt(item(hint="Look.", options=OPTIONS), how)
    assert text == f"Look.\nwhat is it?\nA. a cat\nB. a dog\n{LETTER}"
    text = render_prompt(item(question="这是什么？", options=OPTIONS), how)
    assert text == "这是什么？\nA. a cat\nB. a dog\n请直接回答选项字母。"


def test_braces_of_a_question_stay():
    how = TASKS["chartqa"].settings_of("lmms")
    assert render_prompt(item(question="{options} {x}"), how).startswith("{options} {x}\n")


def test_mmmu_differs_in_each_harness():
    open_question = item(question="How long is <image 1>?")
    texts = [render_prompt(open_question, TASKS["mmmu"].settings_of(preset)) for preset in PRESETS]
    assert texts == [
        f"How long is <image 1>?\n{WORD}",
        "How long is <image 1>?\nAnswer the question directly.",
        f"How long is <image 1>?\n\n{WORD}",
    ]
    choice = item(options=OPTIONS)
    lmms = render_prompt(choice, TASKS["mmmu"].settings_of("lmms"))
    assert lmms == f"what is it?\nA. a cat\nB. a dog\n\n{LETTER}"


def test_what_the_data_say_already_is_dropped():
    said = f"Is it red?\n{WORD}"
    assert render_prompt(item(question=said), TASKS["pope"].settings_of("internvl")) == (
        f"Is it red? {WORD}"
    )
    mme = TASKS["mme"].settings_of("lmms")
    assert render_prompt(item(question="Is it red? Please answer yes or no."), mme) == (
        f"Is it red?\n{WORD}"
    )


def test_every_task_has_three_presets_with_known_metric_and_parser():
    for task in TASKS.values():
        for preset in PRESETS:
            how = task.settings_of(preset)
            assert how.metric in METRICS, task.name
            assert how.parser in PARSERS, task.name
            assert "{question}" in how.prompt or "{capitalized}" in how.prompt, task.name


@pytest.mark.parametrize(
    ("preset", "tiles"), [("internvl", (24, 24)), ("vlmevalkit", (24, 12)), ("lmms", (12, 12))]
)
def test_several_images_share_the_tiles_of_a_harness(preset, tiles):
    how = TASKS["infovqa"].settings_of(preset)
    one, five = (make_request(item(images=(noise(),) * count), how) for count in (1, 5))
    assert (one.max_tiles, five.max_tiles) == tiles


def test_lmms_joins_placeholders_by_blanks():
    request = make_request(item(images=(noise(), noise())), TASKS["docvqa"].settings_of("lmms"))
    assert request.text.startswith("<image> <image>\nwhat is it?\n")
    request = make_request(item(images=(noise(),)), TASKS["docvqa"].settings_of("lmms"))
    assert request.text.startswith("what is it?")


def test_mmmu_joins_its_images_and_enlarges_the_first():
    vlm = load(str(tiny(Recipe()).folder))
    how = TASKS["mmmu"].settings_of("internvl")
    request = make_request(item(images=(noise(90, 30), noise(50, 70, 1))), how)
    assert (request.images[0].width, request.images[0].height) == (180, 60)
    config = GenerationConfig(max_tiles=6)
    text, joined = build_request(request, how, vlm.processor, config)
    inputs = vlm.runner.build_inputs(text, joined, config)
    first = vlm.processor.process_image(request.images[0], config)
    assert inputs.num_tiles == [len(first.tiles) + 1]
    assert np.array_equal(inputs.tiles[: len(first.tiles)], first.tiles)


def test_video_frames_stand_on_lines_of_their_own(tmp_path):
    for number in range(5):
        noise(40, 30, number).save(tmp_path / f"{number:03}.png")
    asked = item(videos=(tmp_path,), options=OPTIONS)
    card = make_request(asked, TASKS["mvbench"].settings_of("internvl"))
    assert card.text.startswith("Frame1: <image>\nFrame2: <image>\n")
    assert "\nQuestion: what is it?\nOptions:\n(A) a cat\n(B) a dog\nOnly give" in card.text
    assert (len(card.images), card.max_tiles) == (16, 1)
    kit = make_request(asked, TASKS["mvbench"].settings_of("vlmevalkit"))
    assert kit.text.startswith("Frame-1: <image>\n")


def test_tasks_are_found_by_the_names_of_their_files():
    assert find_task("ChartQA_TEST") is find_task("chart-qa") is TASKS["chartqa"]
    with pytest.raises(UserError, match="no task or file 'chartqq'; did you mean chartqa"):
        find_task("chartqq")
