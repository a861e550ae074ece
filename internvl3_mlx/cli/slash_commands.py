"""The slash commands of the chat: a table of names, what they want and what they do."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.input_line import Dropped, kind_of, read_line, words
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.cli.chat_session import Session

NAME = re.compile(r"/([A-Za-z]+|\?)(?=\s|$)")
UNSET = ("none", "default")
WITH_CACHE = "cache"
NOT_SET = ("history", "video")  # they belong to one question
SHORT_NAMES = {"temp": "temperature"}


@dataclass(frozen=True)
class Command:
    """``wants``: the argument without which it cannot run; ``takes``: one that may follow."""

    name: str
    help: str
    act: Callable[["Session", str], None]
    wants: str = ""
    takes: str = ""


def named(text: str) -> tuple[Command, str] | None:
    """Find the command a line begins with. A path is none; an unknown /word is told."""
    match = NAME.match(text)
    if match is None:
        refuse_missing(text)
        return None
    name = ALIASES.get(match[0], match[0])
    if name not in TABLE:
        near = difflib.get_close_matches(name, [*TABLE], n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
        raise UserError(f"no such command or image: {match[0]}; {hint}")
    return TABLE[name], text[match.end() :].strip()


def refuse_missing(text: str) -> None:
    """Tell of a line that is one word, starts like a command, and is no image either."""
    word = text.strip()
    if re.fullmatch(r"/[^/\s]+", word) and kind_of(word) and read_line(word).missing:
        raise UserError(f"no such command or image: {word}; /help lists the commands")


def image(session: "Session", argument: str) -> None:
    found = [Dropped(word, kind_of(word) or "image") for word, _, _ in words(argument)]
    for dropped in found:
        session.attach(dropped)


def paste(session: "Session", _: str) -> None:
    session.attach(Dropped("clipboard", "image"))


def images(session: "Session", _: str) -> None:
    shown = [f"{Path(info.source).name} · {info.tiles} tiles" for info in session.talk.images]
    shown += [f"{item.name} · for the next question" for item in session.pending]
    for number, text in enumerate(shown, start=1):
        console.hint(f"{number}  {text}")
    if not shown:
        console.hint("no pictures yet; drop one, or /image PATH")


def drop(session: "Session", argument: str) -> None:
    if not argument.isdecimal():
        raise UserError(f"/drop wants a number from /images, not {argument}")
    number, held = int(argument), len(session.talk.images)
    if held < number <= held + len(session.pending):
        console.hint(f"dropped {session.pending.pop(number - held - 1).name}")
    else:
        console.hint(f"dropped {Path(session.talk.drop_image(number).source).name}")


def clear(session: "Session", _: str) -> None:
    session.talk.clear()
    session.pending.clear()
    console.hint("a new talk")


def undo(session: "Session", _: str) -> None:
    """Take back the last question; its pictures wait for the next."""
    console.hint(f"took back: {reopened(session)}")


def reopened(session: "Session") -> str:
    from internvl3_mlx.cli.chat_session import Attached

    last = session.talk.undo()
    shown = [Attached(Path(seen.info.source).name, seen) for seen in last.pictures]
    shown += [Attached(Path(film.name).name, film) for film in last.films]
    session.pending[:0] = shown
    return last.question


def retry(session: "Session", _: str) -> None:
    session.again()


def edit(session: "Session", _: str) -> None:
    """Change the last question in the user's editor and ask it again, or write a first one."""
    import click

    old = session.talk.exchanges[-1].question if session.talk.exchanges else ""
    new = click.edit(old)
    if new is None or not new.strip():
        console.hint("nothing was changed")
        return
    if session.talk.exchanges:
        reopened(session)
    session.ask(new.strip("\n"))


def forget(session: "Session", argument: str) -> None:
    if argument and not argument.isdecimal():
        raise UserError(f"/forget wants how many of the oldest questions, not {argument}")
    session.talk.forget(int(argument or 1))
    console.hint(f"{len(session.talk.exchanges)} questions are left")


def system(session: "Session", argument: str) -> None:
    session.talk.change(system=None if argument.lower() in UNSET else argument)
    console.hint("the system text holds from the next question on")


def set_value(session: "Session", argument: str) -> None:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    name = SHORT_NAMES.get(name, name)
    if not text.strip() or name in NOT_SET:
        raise UserError("/set wants NAME VALUE, such as temperature 0.7; /show lists what is set")
    try:
        session.talk.change(**{name: value_of(name, text.strip())})
    except TypeError as error:
        raise UserError(f"{name} cannot be {text.strip()}; wanted a number") from error
    console.hint(f"{name} = {getattr(session.talk.settings, name)}")


def value_of(name: str, text: str) -> Any:
    """Read a value as YAML does; a V2PE step as its flag does; none is the default."""
    from internvl3_mlx import Settings

    if text.lower() in UNSET:
        return getattr(Settings(), name, None)
    if name == "v2pe_delta":
        return options.deltas(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def show(session: "Session", _: str) -> None:
    from internvl3_mlx import Settings

    talk, default = session.talk, Settings()
    budget = talk.budget
    changed = {
        item.name: str(getattr(talk.settings, item.name))
        for item in fields(Settings)
        if getattr(talk.settings, item.name) != getattr(default, item.name)
    }
    table = {
        "model": talk.vlm.name,
        "questions": len(talk.exchanges),
        "pictures": len(talk.images),
        "window": f"{budget.positions:,} of {budget.window:,} positions",
        "memory": f"{console.size(budget.nbytes)} of {console.size(budget.limit_nbytes)}",
        **changed,
    }
    width = max(map(len, table))
    for name, value in table.items():
        console.hint(f"{name.replace('_', ' '):<{width}}  {value}")


def save(session: "Session", argument: str) -> None:
    path, cache = filename(argument)
    session.talk.save(path, cache=cache)
    console.hint(f"saved {path}{' with what was read' if cache else ''}")


def load(session: "Session", argument: str) -> None:
    path, _ = filename(argument)
    with_cache = session.talk.load(path)
    session.pending.clear()
    count = len(session.talk.exchanges)
    read = "nothing has to be read again" if with_cache else "the next question reads it all again"
    console.hint(f"loaded {count} question{'s' * (count != 1)}; {read}")


def filename(argument: str) -> tuple[str, bool]:
    """Read ``FILE`` or ``FILE cache``, with blanks escaped or quoted."""
    found = [word for word, _, _ in words(argument)]
    cache = len(found) > 1 and found[-1] == WITH_CACHE
    if len(found) > 1 + cache:
        raise UserError(f"one file at a time, blanks escaped or quoted: {argument}")
    return found[0], cache


def list_commands(_: "Session", __: str) -> None:
    usages = {f"{c.name} {c.wants or c.takes}".strip(): c.help for c in COMMANDS}
    width = max(map(len, usages))
    for usage, text in usages.items():
        console.hint(f"{usage:<{width}}  {text}")
    console.hint('several lines: Alt-Enter, or between """ and """; Ctrl-C stops an answer')


def leave(session: "Session", _: str) -> None:
    session.over = True


COMMANDS = (
    Command("/image", "attach pictures, videos or PDFs", image, wants="PATH…"),
    Command("/paste", "attach the picture in the clipboard", paste),
    Command("/images", "list the pictures of this talk", images),
    Command("/drop", "take a picture out of the talk", drop, wants="N"),
    Command("/clear", "begin a new talk", clear),
    Command("/undo", "take back the last question", undo),
    Command("/retry", "answer the last question again", retry),
    Command("/edit", "change the last question in your editor", edit),
    Command("/forget", "drop the oldest questions to make room", forget, takes="[N]"),
    Command("/system", "set the system text; none is the model's own", system, wants="TEXT"),
    Command("/set", "set temperature, max-tokens, v2pe-delta …", set_value, wants="NAME VALUE"),
    Command("/show", "show the model, the room left and what is set", show),
    Command("/save", "save the talk; with cache nothing is read again", save, wants="FILE [cache]"),
    Command("/load", "go on with a saved talk", load, wants="FILE"),
    Command("/help", "list the commands", list_commands),
    Command("/exit", "leave; so does Ctrl-D", leave),
)
TABLE = {command.name: command for command in COMMANDS}
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}
