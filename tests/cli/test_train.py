"""``internvl3 train`` by whole screens."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.records import chat_record, write_jsonl
from fixtures.terminal import TerminalProgram
from fixtures.train_sessions import (
    SHORT,
    SMALL,
    begin_training,
    enter_data_folder,
    invoke_train,
    write_data,
)

from internvl3_mlx.cli.flags import SECTIONS, SectionedOption, format_default
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.train import train_command
from internvl3_mlx.option_fields import field_info
from internvl3_mlx.training.checkpoint import list_checkpoints
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.export import remove_run
from internvl3_mlx.training.presets import PRESETS

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
FLAGS = {param.name: param for param in train_command.params}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return enter_data_folder(tmp_path, monkeypatch)


def test_every_field_has_one_flag_of_its_name():
    assert {*FIELDS} <= {*FLAGS}
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in FLAGS[name].opts
    spellings = [
        name for param in train_command.params for name in (*param.opts, *param.secondary_opts)
    ]
    assert len(spellings) == len({*spellings})


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_help_names_the_default_that_is_used(name):
    shown, entry = FLAGS[name].show_default, FIELDS[name]
    if name == "model":
        return
    own = field_info(entry).default_text if entry.default is None else format_default(entry.default)
    presets = [f"{m} {format_default(p[name])}" for m, p in PRESETS.items() if name in p]
    assert (shown or "") == "; ".join(filter(None, [own, *presets]))


def test_a_flag_that_is_not_given_has_no_value_of_its_own(monkeypatch):
    monkeypatch.delenv("INTERNVL3_MODEL", raising=False)
    context = train_command.make_context("train", [])
    assert {name for name in FIELDS if context.params[name] is not None} == set()


def test_every_flag_has_a_heading_and_a_help_text():
    for param in train_command.params:
        assert isinstance(param, SectionedOption)
        assert param.help
        assert param.section in SECTIONS


def test_a_run_from_the_first_word_to_the_last(folder):
    result = begin_training("--steps-per-eval", 2)
    assert result.exit_code == 0, result.stderr
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert facts["method"] == "sft"
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters \(\d+\.\d\d%\)", facts["trained"])
    assert (facts["records"], facts["validation records"], facts["updates"]) == ("6", "2", "3")
    assert (facts["result"], facts["best"]) == ("adapters", "adapters/best")
    lines = result.stderr.splitlines()
    assert lines[0] == "note: the run makes only 3 updates; raise --epochs or --iters for more"
    assert re.fullmatch(r"1 · loss \d+\.\d{4} · [\d,]+ tok/s · [\d.]+ MB", lines[1])
    assert re.match(r"2 · loss \d+\.\d{4} · ", lines[2])
    assert re.fullmatch(r"2 · val loss \d+\.\d{4} · best so far", lines[3])
    assert lines[-1] == "try it with: internvl3 chat --model demo --adapter-path adapters"
    assert (folder / "adapters" / "loss.svg").read_text().startswith("<svg")


def test_a_line_of_mpo_shows_its_terms(folder):
    write_data(folder / "pairs", 4, 2, pairs=True)
    result = invoke_train("--data", "pairs", "--method", "mpo", *SHORT, "--iters", 1)
    assert result.exit_code == 0, result.stderr
    number = r"-?\d+\.\d{4}"
    terms = " · ".join(f"{name} {number}" for name in ("dpo", "bco", "sft", "margin"))
    line = rf"1 · loss {number} · {terms} · [\d,]+ tok/s · [\d.]+ MB"
    validation = rf"1 · val loss {number} · val accuracy {number} · best so far"
    assert re.fullmatch(line, result.stderr.splitlines()[1])
    assert re.fullmatch(validation, result.stderr.splitlines()[2])


def test_the_adapter_of_a_run_changes_answers(folder):
    assert begin_training("--learning-rate", "0.05", "--iters", 8).exit_code == 0
    ask = ["generate", "data/0.png", "-p", "Who is it?", "--model", "demo", "-m", "4"]
    plain = CliRunner().invoke(main, ask).stdout
    adapted = CliRunner().invoke(main, [*ask, "--adapter-path", "adapters"])
    assert adapted.exit_code == 0, adapted.stderr
    assert adapted.stdout != plain
    step = list_checkpoints(Path("adapters"))[-1]
    assert CliRunner().invoke(main, [*ask, "--adapter-path", str(step)]).stdout == adapted.stdout


def test_a_config_file_with_flags_over_it(folder):
    lines = [f"{name}: {value}" for name, value in SMALL.items()]
    (folder / "mine.yaml").write_text("\n".join([*lines, "data: data", "iters: 5", "seed: 1"]))
    result = invoke_train("-c", "mine.yaml", "--iters", 2, "--json")
    assert result.exit_code == 0, result.stderr
    kept = build_config({}, folder / "adapters" / "train_config.yaml")
    assert (kept.iters, kept.seed, kept.lora_rank) == (2, 1, 3)


def test_json_is_one_line_per_event(folder):
    result = begin_training("--json", "--save-every", 2, "--steps-per-eval", 3)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        "plan", "update", "update", "checkpoint", "update", "validation", "checkpoint", "end",
    ]  # fmt: skip
    plan, *_, validation, checkpoint, end = events
    assert plan["records"] == 6
    assert checkpoint["saved"].endswith("step-000003")
    assert validation["update"] == checkpoint["update"] == 3
    assert validation["val_loss"] == end["best_loss"]
    assert end["stopped"] is None
    assert result.stderr == ""


def test_quiet_says_nothing(folder):
    result = begin_training("--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_a_dry_run_writes_nothing(folder):
    result = begin_training("--dry-run")
    assert result.exit_code == 0
    assert "updates" in result.stdout
    assert not (folder / "adapters").exists()


def test_a_run_resumes_by_its_folder_alone(folder):
    assert begin_training().exit_code == 0
    result = invoke_train("--resume")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"resuming after update +3", result.stdout)
    assert "all 3 updates are done already; to make more, pass --iters N" in result.stderr
    further = invoke_train("--resume", "--iters", 4)
    assert further.exit_code == 2
    assert "iters was 3 and is now 4" in further.stderr
    assert invoke_train("--resume", "--iters", 4, "--accept-changes").exit_code == 0
    assert list_checkpoints(folder / "adapters")[-1].name == "step-000004"


def test_an_earlier_run_is_not_overwritten_by_default(folder):
    assert begin_training().exit_code == 0
    (folder / "adapters" / "mine.txt").write_text("mine")
    again = begin_training()
    assert again.exit_code == 2
    assert again.stderr == (
        "error: adapters is not empty; continue its run with --resume, choose another "
        "--adapter-path, or pass --overwrite\n"
    )
    assert begin_training("--overwrite", "--iters", 2).exit_code == 0
    assert [path.name for path in list_checkpoints(folder / "adapters")] == ["step-000002"]
    assert (folder / "adapters" / "mine.txt").exists()


@pytest.mark.parametrize("place", ["best/mine.txt", "model/photos/cat.png", "checkpoints/step-9/x"])
def test_overwrite_refuses_a_run_that_holds_other_files(folder, place):
    mine = folder / "adapters" / place
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    ours = folder / "adapters" / "best" / "adapter_config.json"
    ours.parent.mkdir(exist_ok=True)
    ours.write_text("{}")
    result = begin_training("--overwrite")
    assert result.exit_code == 2
    in_the_way = "adapters/model/photos" if "photos" in place else f"adapters/{place}"
    assert result.stderr == f"error: {in_the_way} was not written by a run; move it away\n"
    assert (mine.read_text(), ours.read_text()) == ("mine", "{}")


def test_removing_a_run_keeps_what_came_after_the_check(tmp_path):
    files = ["best/mine.txt", "best/adapter_config.json", "checkpoints/step-000002/state.json"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("x")
    (tmp_path / "model").symlink_to(elsewhere)
    remove_run(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"best/mine.txt", "elsewhere/config.json"}
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no training data; pass --data with a folder or a JSONL file"),
        (["--data", "none"], "no data at none"),
        (["--data", "data", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--data", "data", "--batch-size", "x"], "'x' is not a valid integer"),
        (["--data", "data", "--lora-keys", "q_prj", "--model", "demo"], "matches no linear layer"),
        (
            ["--data", "data", "--resume", "--overwrite"],
            "--resume and --overwrite are mutually exclusive",
        ),
        (
            ["--data", "data", "--resume", "--model", "demo"],
            "no checkpoint in adapters to resume from",
        ),
        (["--resume"], "no run in adapters; name its folder with --adapter-path"),
        (["--data", "data", "--adapter-path", "data/train.jsonl"], "train.jsonl is a file; choose"),
        (["--data", "data", "--v2pe-delta", "auto"], "v2pe_delta auto is for generation only"),
        (["-c", "none.yaml"], "cannot read none.yaml"),
        (
            ["--data", "data", "--method", "mpo", "--model", "demo"],
            "--method mpo needs preference pairs",
        ),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_left_behind(folder, words, message):
    result = invoke_train(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (folder / "adapters").exists()


def test_check_shows_a_sample_with_its_loss_mask(folder):
    result = invoke_train("--data", "data", "--model", "demo", "--check", "--max-tiles", 1)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:3] == ["train", "  records      6", "  invalid      0"]
    assert re.search(r"data/train.jsonl:1: \d+ tokens, \d+ of them in the loss", result.stdout)
    assert "[image: 16 tokens]" in result.stdout
    assert lines[-1] == "»cat<|im_end|>«"
    assert result.stderr == "»in the loss«\n"
    assert not (folder / "adapters").exists()


def test_check_tells_every_error_by_file_and_line(folder):
    rows = [chat_record(), {"messages": []}, "{", chat_record(images=["gone.png"])]
    write_jsonl(folder / "data" / "train.jsonl", rows)
    result = invoke_train("--data", "data", "--model", "demo", "--check")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line[: len("error: data/train.jsonl:2: ")] for line in lines] == [
        f"error: data/train.jsonl:{n}: " for n in (2, 3, 4)
    ]
    as_json = json.loads(
        invoke_train("--data", "data", "--model", "demo", "--check", "--json").stdout
    )
    assert len(as_json["train"]["errors"]) == 3
    assert as_json["sample"] is None
    assert begin_training().exit_code == 2


def test_check_in_json_holds_the_sample(folder):
    result = invoke_train("--data", "data", "--model", "demo", "--check", "--json")
    sample = json.loads(result.stdout)["sample"]
    assert [part["text"] for part in sample["parts"] if part["in_loss"]] == ["cat<|im_end|>"]


def test_both_answers_of_a_pair_are_marked_apart(folder):
    write_data(folder / "pairs", 2, pairs=True)
    result = invoke_train("--data", "pairs", "--model", "demo", "--check", "--method", "mpo")
    assert result.exit_code == 0, result.stderr
    assert "»cat<|im_end|>«›no cat<|im_end|>‹" in result.stdout.replace("\n", "")


def test_check_shows_an_answer_with_its_label(folder):
    write_data(folder / "rated", 3, labels=True)
    result = invoke_train("--data", "rated", "--model", "demo", "--check", "--method", "kto")
    assert result.exit_code == 0, result.stderr
    assert "»cat<|im_end|>«" in result.stdout.replace("\n", "")
    assert "2 records: the answer is desirable" in result.stderr
    assert "1 record: the answer is undesirable" in result.stderr


def test_a_reward_function_runs_only_when_the_command_names_it(folder):
    write_data(folder / "asked", 3)
    Path("mine.py").write_text(
        "open('ran', 'w').close()\ndef length(answer, expected): return len(answer)\n"
    )
    Path("grpo.yaml").write_text("method: grpo\nreward: mine.py:length\nmodel: demo\n")
    few = ("--num-generations", 2, "--max-completion-length", 3, "--iters", 1, "--quiet")
    only_file = invoke_train("-c", "grpo.yaml", "--data", "asked", *few)
    assert only_file.exit_code == 2
    assert "to run it, name it on the command line: --reward mine.py:length" in only_file.stderr
    assert not Path("ran").exists()
    named = invoke_train("-c", "grpo.yaml", "--data", "asked", "--reward", "mine.py:length", *few)
    assert named.exit_code == 0, named.stderr
    assert "rewards are computed by your own function mine.py:length" in named.stderr
    assert Path("ran").exists()


def test_check_shows_what_grpo_asks_and_expects(folder):
    write_data(folder / "asked", 2)
    words = ("--method", "grpo", "--reward", "exact")
    result = invoke_train("--data", "asked", "--model", "demo", "--check", *words)
    assert result.exit_code == 0, result.stderr
    assert "Who is it?" in result.stdout
    assert "<|im_start|>assistant" in result.stdout


@pytest.fixture
def terminal(folder):
    programs = []

    def start(*words):
        env = {"INTERNVL3_CACHE": str(folder / "cache")}
        programs.append(TerminalProgram("train", *words, cwd=folder, columns=110, **env))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


def test_ctrl_c_saves_and_says_how_to_resume(folder, terminal):
    program = terminal("--data", "data", *SHORT, "--iters", "400", "--save-every", "300")
    program.wait_for(r"3 · loss")
    program.type("\x03")
    screen = program.wait_for("chat --model demo --adapter-path adapters")
    assert program.wait() == 130
    assert "stopping after this update, then saving; press Ctrl-C again to stop at once" in screen
    assert "note: stopped: interrupted" in screen
    assert "resume with: internvl3 train --resume --adapter-path adapters" in screen
    assert len(list_checkpoints(folder / "adapters")) == 1
    assert (folder / "adapters" / "adapter_model.safetensors").exists()


LONG_UPDATES = ("--iters", "400", "--save-every", "300", "--grad-accumulation-steps", "60")


def test_a_second_ctrl_c_stops_at_once_and_keeps_whole_updates(folder, terminal):
    program = terminal("--data", "data", *SHORT, *LONG_UPDATES)
    program.wait_for(r"1 · loss")
    program.type("\x03")
    program.wait_for("press Ctrl-C again to stop at once")
    program.type("\x03")
    screen = program.wait_for("resume with: internvl3 train --resume --adapter-path adapters")
    assert program.wait() == 130
    assert "note: stopped at once; saved up to update 1" in screen
    assert [path.name for path in list_checkpoints(folder / "adapters")] == ["step-000001"]


def test_a_closed_terminal_saves_the_run(folder, terminal):
    program = terminal("--data", "data", *SHORT, "--iters", "4000", "--save-every", "3000")
    program.wait_for(r"3 · loss")
    os.close(program.master)
    assert program.process.wait(60) == 130
    program.master = os.open(os.devnull, os.O_RDWR)
    [saved] = list_checkpoints(folder / "adapters")
    assert (folder / "adapters" / "adapter_model.safetensors").exists()
    assert json.loads((saved / "state.json").read_text())["update"] >= 3


def test_on_a_terminal_the_loss_mask_is_colored(terminal):
    program = terminal("--data", "data", "--model", "demo", "--check", "--max-tiles", "1")
    program.wait_for("green is in the loss")
    assert program.wait() == 0
    assert re.search(r"\x1b\[32m\x1b\[1mcat<\|im_end\|>\x1b\[0m", program.raw)
    assert "»" not in program.raw
