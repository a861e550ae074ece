"""The slash commands of the chat: a table of names, what they want and what they do."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.input_line import MediaSource, media_kind, parse_line, split_words
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.cli.chat_session import ChatSession

COMMAND_PATTERN = re.compile(r"/([A-Za-z]+|\?)(?=\s|$)")
DEFAULT_WORDS = ("none", "default")
WITH_CACHE = "cache"
NOT_SET = ("history", "video")  # they belong to one question
SHORT_NAMES = {"temp": "temperature"}


@dataclass(frozen=True)
class SlashCommand:
    """``required``: the argument without which it cannot run; ``optional``: one that may follow."""

    name: str
    help: str
    action: Callable[["ChatSession", str], None]
    required: str = ""
    optional: str = ""


def find_command(text: str) -> tuple[SlashCommand, str] | None:
    """Find the command a line begins with. A path is none; an unknown /word is told."""
    match = COMMAND_PATTERN.match(text)
    if match is None:
        refuse_unknown_word(text)
        return None
    name = ALIASES.get(match[0], match[0])
    if name not in COMMANDS_BY_NAME:
        near = difflib.get_close_matches(name, [*COMMANDS_BY_NAME], n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
        raise UserError(f"no such command or image: {match[0]}; {hint}")
    return COMMANDS_BY_NAME[name], text[match.end() :].strip()


def refuse_unknown_word(text: str) -> None:
    """Tell of a line that is one word, starts like a command, and is no image either."""
    word = text.strip()
    if re.fullmatch(r"/[^/\s]+", word) and media_kind(word) and parse_line(word).problems:
        raise UserError(f"no such command or image: {word}; /help lists the commands")


def attach_files(session: "ChatSession", argument: str) -> None:
    found = [MediaSource(word, media_kind(word) or "image") for word, _, _ in split_words(argument)]
    for dropped in found:
        session.attach(dropped)


def attach_clipboard(session: "ChatSession", _: str) -> None:
    session.attach(MediaSource("clipboard", "image"))


def list_images(session: "ChatSession", _: str) -> None:
    shown = [
        f"{Path(info.source).name} · {info.tiles} tiles" for info in session.conversation.images
    ]
    shown += [f"{item.name} · for the next question" for item in session.pending]
    for number, text in enumerate(shown, start=1):
        console.hint(f"{number}  {text}")
    if not shown:
        console.hint("no pictures yet; drop one, or /image PATH")


def drop_image(session: "ChatSession", argument: str) -> None:
    if not argument.isdecimal():
        raise UserError(f"/drop wants a number from /images, not {argument}")
    number, held = int(argument), len(session.conversation.images)
    if held < number <= held + len(session.pending):
        console.hint(f"dropped {session.pending.pop(number - held - 1).name}")
    else:
        console.hint(f"dropped {Path(session.conversation.drop_image(number).source).name}")


def clear_conversation(session: "ChatSession", _: str) -> None:
    session.conversation.clear()
    session.pending.clear()
    console.hint("a new talk")


def undo_question(session: "ChatSession", _: str) -> None:
    """Take back the last question; its pictures wait for the next."""
    console.hint(f"took back: {reopen_last_question(session)}")


def reopen_last_question(session: "ChatSession") -> str:
    from internvl3_mlx.cli.chat_session import Attachment

    last = session.conversation.undo()
    shown = [Attachment(Path(seen.info.source).name, seen) for seen in last.images]
    shown += [Attachment(Path(film.name).name, film) for film in last.videos]
    session.pending[:0] = shown
    return last.question


def retry_answer(session: "ChatSession", _: str) -> None:
    session.retry()


def edit_question(session: "ChatSession", _: str) -> None:
    """Change the last question in the user's editor and ask it again, or write a first one."""
    import click

    old = session.conversation.exchanges[-1].question if session.conversation.exchanges else ""
    new = click.edit(old)
    if new is None or not new.strip():
        console.hint("nothing was changed")
        return
    if session.conversation.exchanges:
        reopen_last_question(session)
    session.ask(new.strip("\n"))


def forget_questions(session: "ChatSession", argument: str) -> None:
    if argument and not argument.isdecimal():
        raise UserError(f"/forget wants how many of the oldest questions, not {argument}")
    session.conversation.drop_oldest(int(argument or 1))
    console.hint(f"{len(session.conversation.exchanges)} questions are left")


def set_system(session: "ChatSession", argument: str) -> None:
    session.conversation.configure(system=None if argument.lower() in DEFAULT_WORDS else argument)
    console.hint("the system text holds from the next question on")


def set_option(session: "ChatSession", argument: str) -> None:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    name = SHORT_NAMES.get(name, name)
    if not text.strip() or name in NOT_SET:
        raise UserError("/set wants NAME VALUE, such as temperature 0.7; /show lists what is set")
    try:
        session.conversation.configure(**{name: parse_value(name, text.strip())})
    except TypeError as error:
        raise UserError(f"{name} cannot be {text.strip()}; wanted a number") from error
    console.hint(f"{name} = {getattr(session.conversation.generation_config, name)}")


def parse_value(name: str, text: str) -> Any:
    """Read a value as YAML does; a V2PE step as its flag does; none is the default."""
    from internvl3_mlx import GenerationConfig

    if text.lower() in DEFAULT_WORDS:
        return getattr(GenerationConfig(), name, None)
    if name == "v2pe_delta":
        return options.parse_deltas(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def show_state(session: "ChatSession", _: str) -> None:
    from internvl3_mlx import GenerationConfig

    talk, default = session.conversation, GenerationConfig()
    budget = talk.budget
    changed = {
        item.name: str(getattr(talk.generation_config, item.name))
        for item in fields(GenerationConfig)
        if getattr(talk.generation_config, item.name) != getattr(default, item.name)
    }
    table = {
        "model": talk.runner.name,
        "questions": len(talk.exchanges),
        "pictures": len(talk.images),
        "window": f"{budget.positions:,} of {budget.window:,} positions",
        "memory": f"{console.format_size(budget.nbytes)} of {console.format_size(budget.limit_nbytes)}",
        **changed,
    }
    width = max(map(len, table))
    for name, value in table.items():
        console.hint(f"{name.replace('_', ' '):<{width}}  {value}")


def save_conversation(session: "ChatSession", argument: str) -> None:
    path, cache = parse_filename(argument)
    session.conversation.save(path, cache=cache)
    console.hint(f"saved {path}{' with what was read' if cache else ''}")


def load_conversation(session: "ChatSession", argument: str) -> None:
    path, _ = parse_filename(argument)
    with_cache = session.conversation.load(path)
    session.pending.clear()
    count = len(session.conversation.exchanges)
    read = "nothing has to be read again" if with_cache else "the next question reads it all again"
    console.hint(f"loaded {count} question{'s' * (count != 1)}; {read}")


def parse_filename(argument: str) -> tuple[str, bool]:
    """Read ``FILE`` or ``FILE cache``, with blanks escaped or quoted."""
    found = [word for word, _, _ in split_words(argument)]
    cache = len(found) > 1 and found[-1] == WITH_CACHE
    if len(found) > 1 + cache:
        raise UserError(f"one file at a time, blanks escaped or quoted: {argument}")
    return found[0], cache


def show_help(_: "ChatSession", __: str) -> None:
    usages = {f"{c.name} {c.required or c.optional}".strip(): c.help for c in COMMANDS}
    width = max(map(len, usages))
    for usage, text in usages.items():
        console.hint(f"{usage:<{width}}  {text}")
    console.hint('several lines: Alt-Enter, or between """ and """; Ctrl-C stops an answer')


def leave_chat(session: "ChatSession", _: str) -> None:
    session.is_finished = True


COMMANDS = (
    SlashCommand("/image", "attach pictures, videos or PDFs", attach_files, required="PATH…"),
    SlashCommand("/paste", "attach the picture in the clipboard", attach_clipboard),
    SlashCommand("/images", "list the pictures of this talk", list_images),
    SlashCommand("/drop", "take a picture out of the talk", drop_image, required="N"),
    SlashCommand("/clear", "begin a new talk", clear_conversation),
    SlashCommand("/undo", "take back the last question", undo_question),
    SlashCommand("/retry", "answer the last question again", retry_answer),
    SlashCommand("/edit", "change the last question in your editor", edit_question),
    SlashCommand(
        "/forget", "drop the oldest questions to make room", forget_questions, optional="[N]"
    ),
    SlashCommand(
        "/system", "set the system text; none is the model's own", set_system, required="TEXT"
    ),
    SlashCommand(
        "/set", "set temperature, max-tokens, v2pe-delta …", set_option, required="NAME VALUE"
    ),
    SlashCommand("/show", "show the model, the room left and what is set", show_state),
    SlashCommand(
        "/save",
        "save the talk; with cache nothing is read again",
        save_conversation,
        required="FILE [cache]",
    ),
    SlashCommand("/load", "go on with a saved talk", load_conversation, required="FILE"),
    SlashCommand("/help", "list the commands", show_help),
    SlashCommand("/exit", "leave; so does Ctrl-D", leave_chat),
)
COMMANDS_BY_NAME = {command.name: command for command in COMMANDS}
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}
