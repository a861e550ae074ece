"""Errors of the GPU in words, in every command, with nothing lost."""

import mlx.core as mx
import pytest
from click.testing import CliRunner
from fixtures.records import write_image
from fixtures.train_sessions import small_session, write_data

from internvl3_mlx import load
from internvl3_mlx.cli.main import main
from internvl3_mlx.errors import GPUError
from internvl3_mlx.training.checkpoint import list_checkpoints
from internvl3_mlx.training.run import run_session

OUT_OF_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
TIMEOUT = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)
TOO_LARGE = (
    "[metal::malloc] Attempting to allocate 5368709120 bytes which is greater than the maximum "
    "allowed buffer size of 4026531840 bytes."
)
MEANINGS = {
    OUT_OF_MEMORY: "the GPU ran out of memory; try fewer tiles (max_tiles), kv_bits 8",
    WATCHDOG: "let the display sleep while this runs, or start it with AGX_RELAX_CDM_CTXSTORE",
    TIMEOUT: "macOS stopped the GPU because it did not draw the screen in time",
    TOO_LARGE: "one array is larger than this GPU allows; try fewer tiles",
}
QUESTION = "What is this?"


def fail_from(monkeypatch, call, message):
    """Let the ``call``-th call of argmax and all later ones fail; return a switch to mend it."""
    argmax, calls = mx.argmax, [0]

    def failing(*arguments, **options):
        calls[0] += 1
        if calls[0] >= call:
            raise RuntimeError(message)
        return argmax(*arguments, **options)

    monkeypatch.setattr(mx, "argmax", failing)
    return lambda: monkeypatch.setattr(mx, "argmax", argmax)


@pytest.fixture
def image(tmp_path):
    write_image(tmp_path / "noise.png", 90, 60, 3)
    return str(tmp_path / "noise.png")


@pytest.mark.parametrize("message", MEANINGS, ids=["memory", "watchdog", "timeout", "buffer"])
def test_generate_says_what_happened_and_what_helps(monkeypatch, image, message):
    fail_from(monkeypatch, 1, message)
    result = CliRunner().invoke(main, ["generate", image, "-p", QUESTION, "--model", "demo"])
    assert result.exit_code == 1
    assert MEANINGS[message] in result.stderr
    assert "METAL" not in result.stderr.upper().replace("METAL::", "")
    assert result.stderr.count("\n") <= 2


def test_an_unknown_error_is_left_alone(monkeypatch, image):
    fail_from(monkeypatch, 1, "something else")
    with pytest.raises(RuntimeError, match="something else"):
        load("demo").ask(QUESTION, image)


def test_a_model_that_does_not_fit_says_so_when_it_is_loaded(monkeypatch, image):
    def fail(_):
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("internvl3_mlx.loading.build.all_finite", fail)
    with pytest.raises(GPUError, match="out of memory; try fewer bits or a smaller model"):
        load("demo")
    result = CliRunner().invoke(main, ["generate", image, "-p", QUESTION, "--model", "demo"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_any_other_command_says_it_without_a_hint_at_a_traceback(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("internvl3_mlx.convert.pipeline.write_tensors", fail)
    result = CliRunner().invoke(main, ["convert", "demo", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "the GPU ran out of memory; try fewer bits" in result.stderr
    assert "--debug" not in result.stderr


@pytest.mark.parametrize("options", [{"n": 2, "temperature": 0.0}, {"batch_size": 2}])
def test_batches_and_samples_say_it_too(monkeypatch, image, options):
    vlm = load("demo")
    fail_from(monkeypatch, 1, OUT_OF_MEMORY)

    def ask():
        if "n" in options:
            return vlm.ask_many(QUESTION, image, **options)
        return list(vlm.ask_each(QUESTION, [image] * 2, **options))

    with pytest.raises(GPUError, match="out of memory"):
        ask()


def test_a_conversation_goes_on_as_if_nothing_had_been_cached(monkeypatch, image):
    vlm = load("demo")
    conversation, undisturbed = (vlm.conversation(max_tokens=6) for _ in range(2))
    for one in (conversation, undisturbed):
        one.ask(QUESTION, image)
    mend = fail_from(monkeypatch, 1, OUT_OF_MEMORY)
    with pytest.raises(GPUError):
        conversation.ask("And what color is it?")
    mend()
    assert conversation.prompt_cache.layers == []
    question = "And what color is it?"
    assert conversation.ask(question).text == undisturbed.ask(question).text
    assert len(conversation.exchanges) == 2


def test_chat_shows_the_line_and_answers_the_next_question(monkeypatch, image):
    fail_once = [True]
    argmax = mx.argmax

    def failing(*arguments, **options):
        if fail_once.pop() if fail_once else False:
            raise RuntimeError(WATCHDOG)
        return argmax(*arguments, **options)

    monkeypatch.setattr(mx, "argmax", failing)
    result = CliRunner().invoke(
        main, ["chat", image, "--model", "demo"], input=f"{QUESTION}\n{QUESTION}\n"
    )
    assert result.exit_code == 1  # a script learns that one question was not answered
    assert "let the display sleep" in result.stderr
    assert result.stdout.strip()


def test_training_is_saved_first_and_says_how_to_resume(monkeypatch, tmp_path):
    write_data(tmp_path / "data", 6)
    session = small_session(tmp_path, iters=3)
    events = run_session(session)
    next(events)
    monkeypatch.setattr(
        "internvl3_mlx.training.trainer.micro_step",
        lambda *_: (_ for _ in ()).throw(RuntimeError(OUT_OF_MEMORY)),
    )
    with pytest.raises(GPUError) as caught:
        list(events)
    assert "memory ran out; try --batch-size 1 " in str(caught.value)
    assert "--grad-checkpoint" in str(caught.value)
    resume = f"internvl3 train --resume --adapter-path {tmp_path / 'run'}"
    assert str(caught.value).endswith(resume)
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_nothing_is_promised_that_was_not_saved(monkeypatch, tmp_path):
    write_data(tmp_path / "data", 4)
    session = small_session(tmp_path, iters=2)

    def fail(*_arguments, **_options):
        raise RuntimeError(TOO_LARGE)

    monkeypatch.setattr("internvl3_mlx.training.trainer.micro_step", fail)
    monkeypatch.setattr("internvl3_mlx.training.run.save_run", fail)
    with pytest.raises(GPUError) as caught:
        list(run_session(session))
    assert "--resume" not in str(caught.value)
