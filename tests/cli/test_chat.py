"""The chat without a terminal: its commands, its pipes, its mistakes."""

import re
import threading
from pathlib import Path

import pytest
from fixtures.documents import write_pdf
from fixtures.inputs import random_image, write_video
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.videos import make_video
from PIL import Image

import internvl3_mlx
from internvl3_mlx import load
from internvl3_mlx.cli import console
from internvl3_mlx.cli.best_of import BestOfRequest
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.slash_commands import handle_line
from internvl3_mlx.images import video

ROOT = Path(internvl3_mlx.__file__).parents[1]


@pytest.fixture
def session(vlm, tmp_path, monkeypatch):
    """A chat in a folder of two images."""
    monkeypatch.chdir(tmp_path)
    random_image(130, 70).save(tmp_path / "cat.png")
    random_image(60, 60, 1).save(tmp_path / "dog.png")
    return ChatSession(vlm.conversation(max_tokens=4))


@pytest.fixture
def send(session, capsys):
    """Send a line and return what went to stderr."""

    def handle(text):
        handle_line(session, text)
        return capsys.readouterr().err

    return handle


def test_a_dropped_image_waits_for_the_question(session, send):
    assert send("cat.png") == "cat.png 130×70 · 3 tiles · 12 tokens\n"
    assert session.conversation.exchanges == []
    send("What is it?")
    assert [info.source for info in session.conversation.images] == ["cat.png"]
    assert session.pending == []


def test_image_attaches_several_and_images_lists_them(session, send):
    send("/image cat.png 'dog.png'")
    send("Compare.")
    send("dog.png")
    assert send("/images").splitlines() == [
        "1  cat.png · 3 tiles",
        "2  dog.png · 1 tile",
        "3  dog.png · attached to the next question",
    ]
    assert send("/drop 3") == "removed dog.png\n"
    assert send("/drop 1") == "removed cat.png\n"
    assert [info.source for info in session.conversation.images] == ["dog.png"]
    assert "no image 7; this conversation has 1" in send("/drop 7")


def test_the_next_image_is_opened_while_one_is_shown(session, send, monkeypatch):
    opened, shown, ready = [], [], threading.Event()
    process, hint = type(session.conversation).process_image, console.hint

    def processing(conversation, image):
        opened.append(threading.current_thread() is not threading.main_thread())
        if len(opened) == 2:
            ready.set()
        return process(conversation, image)

    def showing(text):
        if not shown:
            assert ready.wait(20)  # for the second, before the first is shown
        shown.append(text.split()[0])
        hint(text)

    monkeypatch.setattr(type(session.conversation), "process_image", processing)
    monkeypatch.setattr(console, "hint", showing)
    send("/image cat.png dog.png")
    assert opened == [True, True]
    assert shown == ["cat.png", "dog.png"]
    assert [item.name for item in session.pending] == shown


def test_an_image_is_encoded_while_the_next_is_opened(session, send, vlm, monkeypatch):
    encoded, waited = threading.Event(), []
    process, encode = type(session.conversation).process_image, type(vlm.model).encode_images

    def processing(conversation, image):
        if "dog" in getattr(image, "name", ""):  # of an open file, not of a processed image
            waited.append(encoded.wait(20))
        return process(conversation, image)

    def encoding(model, pixels):
        encoded.set()
        return encode(model, pixels)

    monkeypatch.setattr(type(session.conversation), "process_image", processing)
    monkeypatch.setattr(type(vlm.model), "encode_images", encoding)
    send("/image cat.png")  # without a question nothing is computed, and nobody waits
    assert not encoded.is_set()
    assert "error" not in send("cat.png dog.png cat.png Compare.")
    assert waited == [True]
    sent = [info.source for info in session.conversation.images]
    assert sent == ["cat.png", "cat.png", "dog.png", "cat.png"]


def test_a_video_is_encoded_while_its_further_frames_are_decoded(session, send, vlm, monkeypatch):
    encoded, waited = threading.Event(), []
    upright, encode = video._upright, type(vlm.model).encode_images

    def decoding(frame):
        waited.append(len(waited) == 4 and encoded.wait(20))
        return upright(frame)

    def encoding(model, pixels):
        encoded.set()
        return encode(model, pixels)

    Path("clip.mp4").write_bytes(make_video())
    monkeypatch.setattr(video, "_upright", decoding)
    monkeypatch.setattr(type(vlm.model), "encode_images", encoding)
    assert "clip.mp4 · 8 frames" in send("clip.mp4 What happens?")
    assert waited == [False, False, False, False, True, False, False, False]
    assert [len(exchange.videos) for exchange in session.conversation.exchanges] == [1]


def test_notes_about_a_file_come_before_its_description(session, send):
    images = [Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    images[0].save("moving.gif", save_all=True, append_images=images[1:])
    lines = send("/image cat.png moving.gif cat.png").splitlines()
    names = [line.removeprefix("note: ").split()[0].rstrip(":") for line in lines]
    assert names == ["cat.png", "moving.gif", "moving.gif", "cat.png"]


def test_a_missing_image_is_reported_and_the_question_is_not_asked(session, send):
    assert "error: no file at cot.png: did you mean cat.png?" in send("cot.png what is it?")
    assert session.conversation.exchanges == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "no such command or image: /hlep; did you mean /help?"),
        ("/cat.png", "no such command or image: /cat.png; /help lists the commands"),
        ("/image", "/image needs an argument: /image PATH…"),
        ("/model", "/model needs an argument: /model NAME"),
        ("/model 2b", "this chat cannot change its model"),
        ("/history 3", "no past conversations"),
        ("/history x", "/history needs a number of its list"),
        ("/set temperture 1", "unknown option 'temperture'; did you mean temperature?"),
        ("/set temperature hot", "temperature cannot be hot; expected a number"),
        ("/set v2pe_delta 1/3", "V2PE step 1/3"),
        ("/set history x", "unknown option 'history'"),
        ("/undo", "nothing has been asked yet"),
        ("/retry", "nothing has been asked yet"),
        ("/forget 3", "nothing has been asked yet"),
        ("/forget x", "/forget needs a number of questions"),
        ("/load nowhere.zip", "no file at nowhere.zip"),
        ("/save a b", "expected one file name"),
    ],
)
def test_mistakes_are_reported_in_one_line_and_the_chat_goes_on(session, send, line, message):
    assert message in send(line)
    assert not session.is_finished


def test_a_path_that_begins_with_a_slash_is_no_command(session, send, tmp_path):
    assert "cat.png 130×70" in send(f"{tmp_path}/cat.png")
    send("/usr/bin is a folder?")
    assert session.conversation.exchanges[0].question == "/usr/bin is a folder?"


def test_undo_returns_the_images_to_the_next_question(session, send):
    send("cat.png What is it?")
    assert send("/undo") == "removed: What is it?\n"
    assert [item.name for item in session.pending] == ["cat.png"]
    send("And now?")
    assert len(session.conversation.images) == 1


def test_retry_answers_in_the_place_of_the_last_answer(session, send):
    send("cat.png What is it?")
    first = session.conversation.exchanges[0].answer
    send("/retry")
    assert [exchange.answer for exchange in session.conversation.exchanges] == [first]


def test_options_apply_from_the_next_question_on(session, send):
    assert send("/set temp 0.5") == "temp = 0.5\n"
    assert send("/set v2pe-delta 1/4") == "v2pe-delta = 0.25\n"
    assert send("/set temperature default") == "temp = 0\n"
    send("/system Be brief.")
    assert session.conversation.generation_config.system == "Be brief."
    shown = send("/show")
    assert "v2pe delta  0.25" in shown
    assert "positions" in shown
    send("/system none")
    assert session.conversation.generation_config.system is None


def test_save_load_and_clear(session, send, tmp_path):
    send("cat.png What is it?")
    assert send("/save my\\ chat.zip cache") == "saved my chat.zip with its prompt cache\n"
    assert (tmp_path / "my chat.zip.safetensors").is_file()
    assert send("/clear") == "started a new conversation\n"
    assert session.conversation.exchanges == []
    assert send("/load 'my chat.zip'") == "loaded 1 question; the prompt cache was restored\n"
    assert len(session.conversation.images) == 1
    send("/save plain.zip")
    cache = session.conversation.prompt_cache
    cache.key = cache.key.prefix(0)
    assert "processes it again" in send("/load plain.zip")


class Keyboard:
    def isatty(self):
        return True


def test_edit_changes_the_last_question_and_asks_again(session, send, monkeypatch):
    send("What is it?")
    assert "/edit opens an editor, which needs a terminal" in send("/edit")  # there is none here
    send("/undo")
    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("click.edit", lambda text: text.replace("it", "this"))
    send("cat.png What is it?")
    send("/edit")
    assert [exchange.question for exchange in session.conversation.exchanges] == ["What is this?"]
    assert len(session.conversation.images) == 1
    monkeypatch.setattr("click.edit", lambda text: None)
    assert send("/edit") == "nothing changed\n"


def test_forget_frees_space(session, send):
    send("One?")
    send("Two?")
    assert send("/forget") == "1 question left\n"
    assert session.conversation.exchanges[0].question == "Two?"


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_leaving(session, send, word):
    send(word)
    assert session.is_finished


@pytest.mark.parametrize("word", ["/help", "/?"])
def test_help_names_every_command(send, word):
    from internvl3_mlx.cli.slash_commands import COMMANDS

    text = send(word)
    assert all(command.name in text and command.help in text for command in COMMANDS)


def test_paste_takes_the_image_in_the_clipboard(session, send, monkeypatch):
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: random_image(60, 60))
    assert "60×60 · 1 tile · 4 tokens" in send("/paste")
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: None)
    assert "no image in the clipboard: copy one first" in send("/paste")


def test_a_video_is_a_sequence_of_images(session, send, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=5)
    send("/set num_frames 3")
    assert send("clip.mp4") == "clip.mp4 · 3 frames · 12 tokens\n"
    send("What happens?")
    assert len(session.conversation.exchanges[0].videos[0].frames) == 3


def test_the_pages_of_a_pdf_are_images(session, send, tmp_path):
    write_pdf(tmp_path / "report.pdf", (100, 200), (100, 200))
    first, second = send("report.pdf").splitlines()
    assert re.match(r"report\.pdf page 1 89\d×179\d · \d+ tiles", first)
    assert second.startswith("report.pdf page 2")


def test_what_is_too_long_is_rejected_and_its_images_are_kept(send, tmp_path, monkeypatch):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    monkeypatch.chdir(tmp_path)
    random_image(60, 60).save("dog.png")
    session = ChatSession(short.conversation(system=""))
    handle_line(session, "dog.png")
    handle_line(session, "word " * 300)
    assert [item.name for item in session.pending] == ["dog.png"]


def test_the_user_is_warned_before_the_window_is_full(capsys):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    session = ChatSession(short.conversation(system="", max_tokens=12))
    handle_line(session, "word " * 14)
    assert "of 96 positions; to free some: forget the oldest" in capsys.readouterr().err


def test_an_interrupt_before_the_first_word_takes_the_question_back(session, send, monkeypatch):
    send("cat.png")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(session.conversation.runner.model), "encode_tiles", interrupted)
        assert "stopped before the answer began" in send("What is it?")
    assert [item.name for item in session.pending] == ["cat.png"]
    assert session.conversation.exchanges == []
    send("What is it?")
    assert len(session.conversation.exchanges) == 1


def test_an_interrupted_retry_keeps_the_last_answer(session, send, monkeypatch):
    send("What is it?")
    before = session.conversation.exchanges

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("internvl3_mlx.generation.engine.Engine.prefill_rows", interrupted)
        assert "the last answer is unchanged" in send("/retry")
    assert session.conversation.exchanges == before


@pytest.mark.usefixtures("cheap_drafts")
def test_statistics_tell_what_was_kept_and_how_many_draft_tokens_were_right(vlm):
    conversation = vlm.conversation(max_tokens=20, draft_model=vlm)
    conversation.ask("What is it?", [random_image(60, 60)])
    text = console.format_stats(conversation.ask("Why?"))
    assert re.search(
        r"prompt \d+ \(4 image, \d+ cached\) in .* · 100% of \d+ draft tokens accepted( · |$)", text
    )


def test_best_answers_again_with_the_best_of_several(vlm, session, send):
    send("cat.png What is it?")
    session.conversation.configure(temperature=1.0, seed=3)
    said = send("/best 3")
    wanted = vlm.best_of(
        "What is it?", ["cat.png"], n=3, temperature=1.0, top_p=1.0, seed=3, max_tokens=4
    )
    assert session.conversation.exchanges[-1].answer == wanted.answer.text
    assert f"best of 3: candidate {wanted.index} · {wanted.score:.4g} (share of votes)" in said
    send("And why?")
    assert [exchange.question for exchange in session.conversation.exchanges] == [
        "What is it?", "And why?",
    ]  # fmt: skip


def test_best_uses_the_critic_of_the_chat(session, send):
    folder = str(tiny(Recipe(seed=1)).folder)
    session.best_of = BestOfRequest(critic=folder, critic_mode="orm")
    send("cat.png What is it?")
    assert f"({folder}, orm)" in send("/best 2")
    assert session.critic is not None
    loaded = session.critic
    send("/best 2")
    assert session.critic is loaded


def test_a_stopped_best_leaves_the_answer(session, send, monkeypatch):
    send("What is it?")
    before = session.conversation.exchanges

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("internvl3_mlx.test_time_scaling.best_of.write_all", stopped)
    assert "the last answer is unchanged" in send("/best")
    assert session.conversation.exchanges is before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/best", "nothing has been asked yet"),
        ("/best many", "/best needs a number from 1 to 256, not many"),
        ("/best 0", "/best needs a number from 1 to 256, not 0"),
    ],
)
def test_best_needs_a_question_and_a_number(session, send, line, message):
    if line != "/best":
        send("What is it?")
    assert message in send(line)
