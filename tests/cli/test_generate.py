import json
import os
import pty
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.fake_vlm import FakeVLM
from PIL import Image

import internvl3_mlx
from internvl3_mlx.cli.load_model import UNTRAINED_NOTE
from internvl3_mlx.cli.main import main
from internvl3_mlx.errors import PromptError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vlm(monkeypatch):
    fake = FakeVLM()
    monkeypatch.setitem(vars(internvl3_mlx), "load", fake.load)  # not fetched from its module
    monkeypatch.delenv("INTERNVL3_MODEL", raising=False)
    return fake


@pytest.fixture
def red(tmp_path):
    return save(tmp_path / "red.png")


@pytest.fixture
def green(tmp_path):
    return save(tmp_path / "my green.png", "green")


@pytest.fixture
def missing(tmp_path):
    return str(tmp_path / "missing.png")


def save(path: Path, colour: str = "red") -> str:
    Image.new("RGB", (7, 5), colour).save(path)
    return str(path)


def generate(*args: str, **kwargs):
    return CliRunner().invoke(main, ["generate", *args], prog_name="internvl3", **kwargs)


def screens(result) -> tuple[str, str, int]:
    return result.stdout, result.stderr, result.exit_code


def test_the_answer_is_all_there_is_on_stdout(vlm, red):
    assert screens(generate(red, "-p", "What is this?")) == ("A red square.\n", "", 0)
    assert [(question, len(names)) for question, names, _ in vlm.asked] == [("What is this?", 1)]


def test_a_question_needs_no_image(vlm):
    assert screens(generate("-p", "Who are you?")) == ("A red square.\n", "", 0)
    assert vlm.asked == [("Who are you?", [], {})]


def test_images_come_in_the_order_given_positional_first(vlm, red, green):
    generate("-i", green, red, "-p", "Which?")
    ((_, names, _),) = vlm.asked
    assert [Path(name).name for name in names] == ["red.png", "my green.png"]


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_the_question_is_read_from_a_pipe(vlm, flags):
    assert generate(*flags, input="What is this?\n").exit_code == 0
    assert vlm.asked[0][0].strip() == "What is this?"


def test_an_image_is_read_from_a_pipe(vlm):
    png = BytesIO()
    Image.new("RGB", (7, 5), "red").save(png, "PNG")
    assert generate("-", "-p", "What is this?", input=png.getvalue()).exit_code == 0
    assert vlm.asked == [("What is this?", ["standard input"], {})]


def test_at_a_keyboard_a_missing_question_is_reported_at_once(red):
    keyboard, ours = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "internvl3_mlx", "generate", red],
        cwd=ROOT,
        stdin=ours,
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(keyboard)
    os.close(ours)
    assert done.stderr == 'error: no question; pass -p "What is this?" or pipe text in\n'
    assert (done.stdout, done.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-p", " "], 'the question is empty; pass -p "What is this?" or pipe text in'),
        ([], 'the question is empty; pass -p "What is this?" or pipe text in'),
        (["-"], "standard input is used for the image; pass the question with -p"),
        (
            ["-", "-", "-p", "?"],
            "- was given more than once, but standard input can be read only once",
        ),
        (
            ["-", "--video", "-", "-p", "?"],
            "- was given more than once, but standard input can be read only once",
        ),
        (["--json", "--jsonl", "-p", "?"], "--json and --jsonl are mutually exclusive; choose one"),
        (
            ["--each", "--json", "a.png", "-p", "?"],
            "--json prints one object; with --each use --jsonl, one line per image",
        ),
        (["--each", "-p", "?"], "--each needs images; name some files"),
        (
            ["--each", "a.png", "--video", "b.mp4", "-p", "?"],
            "--each is for images; ask about one video at a time",
        ),
        (["--video", "no/such.mp4", "-p", "?"], "no file at no/such.mp4: check the path"),
        (
            ["--v2pe-delta", "1/4,auto", "-p", "?"],
            "--v2pe-delta 1/4,auto: auto cannot be combined with other steps; "
            "give one step per image, or auto alone",
        ),
    ],
)
def test_a_mistake_is_reported_before_the_model_loads(vlm, flags, complaint):
    assert screens(generate(*flags, input="")) == ("", f"error: {complaint}\n", 2)
    assert vlm.loaded == []


def test_a_missing_image_is_reported_before_the_model_loads(vlm, red, missing):
    result = generate(red, missing, "-p", "?")
    assert missing in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert (result.stdout, result.exit_code, vlm.loaded) == ("", 2, [])


@pytest.mark.parametrize(
    ("flag", "value", "bound"),
    [
        ("--max-tokens", "0", "max_tokens is 0; choose 1 to 1,000,000,000"),
        ("--temp", "-0.1", "temperature is -0.1; choose 0 to 100"),
        ("--top-p", "1.5", "top_p is 1.5; choose 0 to 1"),
        ("--top-k", "-1", "top_k is -1; choose 0 to"),
        ("--min-p", "2", "min_p is 2.0; choose 0 to 1"),
        ("--repetition-penalty", "0", "repetition_penalty is 0.0; choose 0.01 to 100"),
        ("--max-tiles", "0", "max_tiles is 0; choose 1 to"),
        ("--min-tiles", "0", "min_tiles is 0; choose 1 to"),
        ("--num-frames", "0", "num_frames is 0; choose 1 to"),
        ("--num-samples", "1000", "--num-samples': 1000 is not in the range 1<=x<=256"),
        ("--seed", "-1", "seed is -1; choose 0 to"),
        ("--quantized-kv-start", "-1", "quantized_kv_start is -1; choose 0 to"),
        ("--prefill-step-size", "0", "prefill_step_size is 0; choose 1 to"),
        ("--kv-bits", "5", "--kv-bits': '5' is not one of '4', '8'"),
        ("--kv-group-size", "48", "--kv-group-size': '48' is not one of '32', '64', '128'"),
        ("--q-bits", "1", "--q-bits': '1' is not one of '4', '8', '16'"),
    ],
)
def test_a_value_out_of_range_is_rejected_with_its_range(vlm, flag, value, bound):
    result = generate("-p", "?", flag, value)
    assert result.stderr.startswith("error: ")
    assert bound in result.stderr
    assert (result.stdout, result.exit_code, vlm.loaded) == ("", 2, [])


def test_flags_reach_the_generation_config_and_only_those_given(vlm):
    flags = [
        *("--system", "", "-m", "9", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3"),
        *("--min-p", "0.1", "--repetition-penalty", "1.1", "--seed", "0", "--stop", "a"),
        *("--stop", "b", "--keep-boxes", "--num-frames", "5", "--frame-times", "--max-tiles", "6"),
        *("--min-tiles", "2", "--no-thumbnail", "--no-exif", "--v2pe-delta", "1/4", "--no-ntk"),
        *("--kv-bits", "8", "--kv-group-size", "32"),
        *("--quantized-kv-start", "7", "--prefill-step-size", "512"),
    ]
    assert generate("-p", "?", *flags).exit_code == 0
    assert vlm.asked[0][2] == {
        "system": "",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 0,
        "stop": ("a", "b"),
        "keep_boxes": True,
        "num_frames": 5,
        "frame_times": True,
        "max_tiles": 6,
        "min_tiles": 2,
        "thumbnail": False,
        "upright": False,
        "v2pe_delta": 0.25,
        "ntk": False,
        "kv_bits": 8,
        "kv_group_size": 32,
        "quantized_kv_start": 7,
        "prefill_step_size": 512,
    }


@pytest.mark.parametrize(
    ("text", "delta"), [("auto", "auto"), ("1", 1.0), ("1/256", 1 / 256), ("1, 1/2", (1.0, 0.5))]
)
def test_the_position_step_is_one_or_one_for_each_image(vlm, text, delta):
    assert generate("-p", "?", "--v2pe-delta", text).exit_code == 0
    assert vlm.asked[0][2] == {"v2pe_delta": delta}


def test_a_position_step_off_the_scale_is_rejected(vlm):
    result = generate("-p", "?", "--v2pe-delta", "1/3")
    assert "1/3" in result.stderr
    assert (result.exit_code, vlm.loaded) == (2, [])


def test_a_video_reaches_the_settings(vlm, tmp_path):
    video = tmp_path / "walk.mp4"
    video.write_bytes(b"frames")
    assert generate("-p", "?", "--video", str(video)).exit_code == 0
    assert vlm.asked[0][2] == {"video": (str(video),)}


def test_flags_reach_load_and_only_those_given(vlm):
    generate("-p", "?")
    generate("-p", "?", "--model", "2b", "--q-bits", "4", "--adapter-path", "a", "--revision", "v1")
    assert vlm.loaded == [
        {},
        {"model": "2b", "quantize": 4, "adapter": "a", "revision": "v1"},
    ]


def test_the_environment_names_the_model_and_the_flag_wins(vlm):
    generate("-p", "?", env={"INTERNVL3_MODEL": "8b"})
    generate("-p", "?", "--model", "1b", env={"INTERNVL3_MODEL": "8b"})
    assert vlm.loaded == [{"model": "8b"}, {"model": "1b"}]


def test_stats_go_to_stderr(vlm, red):
    result = generate(red, "-p", "?", "--stats")
    figures = "182 tokens · 61.3 tok/s · prompt 2,041 (1,792 image) in 0.9 s"
    memory = " · peak 3.2 GB · held 4.6 GB\n"
    assert screens(result) == ("A red square.\n", figures + memory, 0)


def test_notes_go_to_stderr(vlm):
    vlm.notes, vlm.trained = ("no network: using the demo model",), False
    notes = f"note: no network: using the demo model\nnote: {UNTRAINED_NOTE}\n"
    assert screens(generate("-p", "?")) == ("A red square.\n", notes, 0)


def test_quiet_silences_notes(vlm):
    vlm.notes, vlm.trained = ("no network: using the demo model",), False
    assert screens(generate("-p", "?", "--quiet")) == ("A red square.\n", "", 0)


def test_json_is_one_object(vlm, red):
    vlm.pieces = ("Ein grünes ", "[/v1]")
    result = generate(red, "-p", "?", "--json")
    assert json.loads(result.stdout) == {"model": "fake", "text": "Ein grünes [/v1]", "images": 1}
    assert "grünes" in result.stdout
    assert (result.stderr, result.exit_code) == ("", 0)


def test_jsonl_is_one_line(vlm, red):
    result = generate(red, "-p", "?", "--jsonl")
    assert result.stdout == '{"model": "fake", "text": "A red square.", "images": 1}\n'


def test_each_prints_the_file_above_every_answer(vlm, red, green):
    result = generate(red, green, "-p", "?", "--each")
    answers = f"== {red}\nA red square.\n== {green}\nA red square.\n"
    assert screens(result) == (answers, "", 0)
    assert len(vlm.loaded) == 1
    assert [len(names) for _, names, _ in vlm.asked] == [1, 1]


def test_each_with_jsonl_is_one_line_a_file(vlm, red, green):
    result = generate(red, green, "-p", "?", "--each", "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["source"] for line in lines] == [red, green]
    assert lines[0] == {"source": red, "model": "fake", "text": "A red square.", "images": 1}
    assert (result.stderr, result.exit_code) == ("", 0)


def test_an_image_that_fails_does_not_stop_the_others(vlm, red, missing):
    result = generate(missing, red, "-p", "?", "--each", "--jsonl")
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first.keys() == {"source", "error"}
    assert first["source"] == missing
    assert second["text"] == "A red square."
    assert (result.stderr, result.exit_code) == ("", 1)


def test_an_answer_that_fails_is_reported_with_its_image(vlm, red):
    vlm.fault = PromptError("too long")
    result = generate(red, "-p", "?", "--each")
    assert screens(result) == (f"== {red}\nA red ", f"error: {red}: too long\n", 1)


def test_when_no_image_can_be_read_no_model_loads(vlm, missing):
    result = generate(missing, "-p", "?", "--each")
    assert missing in result.stderr
    assert (result.stdout, result.exit_code, vlm.loaded) == ("", 2, [])


def test_an_interrupt_keeps_the_text_so_far(vlm):
    vlm.fault = KeyboardInterrupt()
    assert screens(generate("-p", "?")) == ("A red ", "", 130)


def test_the_models_text_is_never_markup(vlm):
    vlm.pieces = ("[bold]x[/v1/models]", "\x1b[31m red\n")
    assert generate("-p", "?").stdout == "[bold]x[/v1/models]\x1b[31m red\n"


@pytest.mark.parametrize(
    ("typed", "flag"),
    [("-q", "--quiet"), ("--samples", "--num-samples"), ("--quantize", "--q-bits")],
)
def test_a_flag_of_another_command_suggests_ours(typed, flag):
    result = generate("-p", "?", typed, "4")
    assert result.stderr.splitlines()[0] == f"error: no such option {typed!r}; did you mean {flag}?"
    assert result.exit_code == 2
