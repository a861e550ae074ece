"""The chat's slash commands: a table of their names, arguments and actions."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from internvl3_mlx.cli import console
from internvl3_mlx.cli.chat_best import answer_best
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.faults import attempt
from internvl3_mlx.cli.input_line import media_kind, media_source, parse_line, split_words
from internvl3_mlx.cli.past_chats import (
    NONE_YET,
    continue_past_chat,
    find_past_chat,
    list_past_chats,
)
from internvl3_mlx.cli.settings import (
    DEFAULT_WORDS,
    format_setting,
    list_settings,
    parse_setting,
    shown_name,
    unquote_all,
)
from internvl3_mlx.errors import UnforeseenError, UserError
from internvl3_mlx.files import did_you_mean

COMMAND_PATTERN = re.compile(r"/([A-Za-z]+|\?)(?=\s|$)")
WITH_CACHE = "cache"
HELP_HINT = "/help lists the commands"


@dataclass(frozen=True)
class SlashCommand:
    """``required``: an argument that must be given; ``optional``: one that may be given."""

    name: str
    help: str
    action: Callable[[ChatSession, str], None]
    required: str = ""
    optional: str = ""


def handle_line(session: ChatSession, text: str) -> None:
    """Handle one input line: a command or a question. Errors are shown and the chat goes on."""
    try:
        fault = attempt(lambda: dispatch_line(session, text))
    finally:
        session.update_log()
    if fault is not None:
        session.num_failed += 1
        if session.debug:
            console.print_traceback(fault)
        unforeseen = isinstance(fault, UnforeseenError)
        console.error(f"{fault}{'; the conversation is unharmed' if unforeseen else ''}")


def dispatch_line(session: ChatSession, text: str) -> None:
    found = find_command(text)
    if found is not None:
        run_command(session, *found)
    elif text.strip():
        session.handle_question(text)


def find_command(text: str) -> tuple[SlashCommand, str] | None:
    """Return the command that a line begins with, and its argument; None for a question.

    A path is not a command; an unknown ``/word`` raises UserError.
    """
    match = COMMAND_PATTERN.match(text)
    if match is None:
        refuse_unknown_word(text)
        return None
    name = ALIASES.get(match[0], match[0])
    if name not in COMMANDS_BY_NAME:
        hint = did_you_mean(name, COMMANDS_BY_NAME, otherwise=HELP_HINT)
        raise UserError(f"no such command or image: {match[0]}; {hint}")
    return COMMANDS_BY_NAME[name], text[match.end() :].strip()


def refuse_unknown_word(text: str) -> None:
    """Raise UserError for a single word that looks like a command and is not a file either."""
    word = text.strip()
    if re.fullmatch(r"/[^/\s]+", word) and media_kind(word) and parse_line(word).problems:
        raise UserError(f"no such command or image: {word}; {HELP_HINT}")


def run_command(session: ChatSession, command: SlashCommand, argument: str) -> None:
    if command.required and not argument:
        raise UserError(f"{command.name} needs an argument: {command.name} {command.required}")
    command.action(session, argument)


def attach_files(session: ChatSession, argument: str) -> None:
    words = [word for word, _, _ in split_words(argument)]
    session.attach([media_source(word) for word in words])


def attach_clipboard(session: ChatSession, _: str) -> None:
    session.attach([media_source("clipboard")])


def list_images(session: ChatSession, _: str) -> None:
    lines = [
        f"{Path(info.source).name} · {console.format_count(info.tiles, 'tile')}"
        for info in session.conversation.images
    ]
    lines += [f"{item.name} · attached to the next question" for item in session.pending]
    for number, text in enumerate(lines, start=1):
        console.hint(f"{number}  {text}")
    if not lines:
        console.hint("no images yet; drop one, or type /image PATH")


def drop_image(session: ChatSession, argument: str) -> None:
    if not argument.isdecimal():
        raise UserError(f"/drop needs a number from /images, not {argument}")
    number, sent = int(argument), len(session.conversation.images)
    if sent < number <= sent + len(session.pending):
        console.hint(f"removed {session.pending.pop(number - sent - 1).name}")
        return
    if not 1 <= number <= sent and session.pending:
        count = sent + len(session.pending)
        raise UserError(f"no image {number}; /images lists 1 to {count}")
    removed = session.conversation.drop_image(number)
    console.hint(f"removed {Path(removed.source).name}")


def clear_conversation(session: ChatSession, _: str) -> None:
    session.conversation.clear()
    session.start_new_log()
    session.pending.clear()
    console.hint("started a new conversation")


def undo_question(session: ChatSession, _: str) -> None:
    """Remove the last question; its attachments become pending again."""
    console.hint(f"removed: {session.reopen_last_question()}")


def retry_answer(session: ChatSession, _: str) -> None:
    session.retry()


def edit_question(session: ChatSession, _: str) -> None:
    """Edit the last question in the user's editor and ask it again, or write a first one."""
    import click

    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError("/edit opens an editor, which needs a terminal; type the question again")
    exchanges = session.conversation.exchanges
    new = click.edit(exchanges[-1].question if exchanges else "")
    if new is None or not new.strip():
        console.hint("nothing changed")
        return
    if exchanges:
        session.reopen_last_question()
    session.ask(new.strip("\n"))


def forget_questions(session: ChatSession, argument: str) -> None:
    if argument and not argument.isdecimal():
        raise UserError(f"/forget needs a number of questions, not {argument}")
    session.conversation.drop_oldest(int(argument or 1))
    remaining = len(session.conversation.exchanges)
    console.hint(f"{console.format_count(remaining, 'question')} left")


def set_system(session: ChatSession, argument: str) -> None:
    is_default = argument.lower() in DEFAULT_WORDS
    session.conversation.configure(system=None if is_default else argument)
    console.hint("the system prompt changes with the next question")


def set_option(session: ChatSession, argument: str) -> None:
    """Set an option and check it at once, or list all."""
    if not argument:
        print_settings(session)
        return
    name, _, text = argument.partition(" ")
    field, value = parse_setting(name, text.strip())
    with console.spinner(f"checking {name}", quiet=session.quiet):
        session.conversation.configure(**{field: value})
    config = session.conversation.generation_config
    console.hint(f"{shown_name(field)} = {format_setting(field, getattr(config, field))}")


def print_settings(session: ChatSession) -> None:
    rows = list_settings(session.conversation.generation_config)
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, default in rows if value == default)
    for name, value, default in rows:
        changed = f"  (default: {default})" if value != default else ""
        console.hint(f"{name:<{name_width}}  {value:<{value_width}}{changed}".rstrip())


def change_model(session: ChatSession, argument: str) -> None:
    """Load another model and continue the conversation with it."""
    session.change_model(unquote_all(argument)[0])


def show_past_chats(session: ChatSession, argument: str) -> None:
    """List past conversations, or continue one."""
    if argument:
        if not argument.isdecimal():
            raise UserError(f"/history needs a number of its list, not {argument}")
        continue_past_chat(session, find_past_chat(int(argument)))
        return
    rows = list_past_chats()
    for row in rows:
        count = console.format_count(row["questions"], "question")
        console.hint(f"{row['number']}  {row['started']} · {count} · {row['first question']}")
    console.hint("/history N continues one" if rows else NONE_YET)


def set_thinking(session: ChatSession, argument: str) -> None:
    """Turn thinking on or off, or bound the thought; alone, say how it is."""
    conversation = session.conversation
    if argument in ("on", "off"):
        conversation.configure(think=argument == "on", think_budget=None)
    elif argument.isdecimal() and int(argument) > 0:
        conversation.configure(think=True, think_budget=int(argument))
    elif argument:
        raise UserError(f"/think cannot be {argument}; choose on, off or a number of tokens")
    config = conversation.generation_config
    if not config.think:
        console.hint("think = off")
        return
    budget = f", at most {config.think_budget:,} tokens" if config.think_budget else ""
    console.hint(f"think = on{budget} · temp {config.temperature:g}")


def show_state(session: ChatSession, _: str) -> None:
    """Show the model, the context and memory in use, and the options that were changed."""
    from internvl3_mlx import GenerationConfig

    conversation, default = session.conversation, GenerationConfig()
    budget, config = conversation.budget, conversation.generation_config
    changed = {
        item.name: str(getattr(config, item.name))
        for item in fields(GenerationConfig)
        if getattr(config, item.name) != getattr(default, item.name)
    }
    used, limit = console.format_size(budget.nbytes), console.format_size(budget.limit_nbytes)
    table = {
        "model": conversation.runner.name,
        "questions": len(conversation.exchanges),
        "images": len(conversation.images),
        "context": f"{budget.positions:,} of {budget.window:,} positions",
        "memory": f"{used} of {limit}",
        **changed,
    }
    width = max(map(len, table))
    for name, value in table.items():
        console.hint(f"{name.replace('_', ' '):<{width}}  {value}")


def save_conversation(session: ChatSession, argument: str) -> None:
    path, cache = parse_filename(argument)
    session.conversation.save(path, cache=cache)
    console.hint(f"saved {path}{' with its prompt cache' if cache else ''}")


def load_conversation(session: ChatSession, argument: str) -> None:
    path, _ = parse_filename(argument)
    with_cache = session.conversation.load(path)
    session.start_new_log()
    session.pending.clear()
    count = console.format_count(len(session.conversation.exchanges), "question")
    cost = "the prompt cache was restored" if with_cache else "the next question processes it again"
    console.hint(f"loaded {count}; {cost}")


def parse_filename(argument: str) -> tuple[str, bool]:
    """Parse ``FILE`` or ``FILE cache``, with blanks in the name escaped or quoted."""
    words = [word for word, _, _ in split_words(argument)]
    cache = len(words) > 1 and words[-1] == WITH_CACHE
    if len(words) > 1 + cache:
        raise UserError(f"expected one file name, got {argument}; escape or quote blanks in it")
    if not words or not words[0].strip(" \"'"):
        raise UserError("the file name is empty; name a file")
    return words[0], cache


def show_help(_: ChatSession, __: str) -> None:
    usages = {f"{c.name} {c.required or c.optional}".strip(): c.help for c in COMMANDS}
    width = max(map(len, usages))
    for usage, text in usages.items():
        console.hint(f"{usage:<{width}}  {text}")
    console.hint('several lines: Alt-Enter, or between """ and """; Ctrl-C stops an answer')


def leave_chat(session: ChatSession, _: str) -> None:
    session.is_finished = True


COMMANDS = (
    SlashCommand("/image", "attach images, videos or PDFs", attach_files, required="PATH…"),
    SlashCommand("/paste", "attach what is on the clipboard", attach_clipboard),
    SlashCommand("/images", "list the images of this conversation", list_images),
    SlashCommand("/drop", "remove an image from the conversation", drop_image, required="N"),
    SlashCommand("/clear", "start a new conversation", clear_conversation),
    SlashCommand("/undo", "remove the last question", undo_question),
    SlashCommand("/retry", "answer the last question again", retry_answer),
    SlashCommand(
        "/best", "answer it again with the best of N candidates", answer_best, optional="[N]"
    ),
    SlashCommand("/edit", "change the last question in your editor", edit_question),
    SlashCommand(
        "/forget", "remove the oldest questions to free space", forget_questions, optional="[N]"
    ),
    SlashCommand(
        "/system", "set the system prompt; default restores it", set_system, required="TEXT"
    ),
    SlashCommand(
        "/set", "set an option, by the names of the flags; alone, list all", set_option,
        optional="[NAME VALUE]",
    ),
    SlashCommand(
        "/think", "think before answering: on, off, or at most N tokens", set_thinking,
        optional="[on|off|N]",
    ),
    SlashCommand(
        "/model", "change the model and keep the conversation", change_model, required="NAME"
    ),
    SlashCommand("/show", "show the model, the space left and what is set", show_state),
    SlashCommand(
        "/save", "save the conversation, with cache also the prompt cache", save_conversation,
        required="FILE [cache]",
    ),
    SlashCommand("/load", "continue a saved conversation", load_conversation, required="FILE"),
    SlashCommand(
        "/history", "list past conversations, or continue one", show_past_chats, optional="[N]"
    ),
    SlashCommand("/help", "list the commands", show_help),
    SlashCommand("/exit", "leave, like Ctrl-D", leave_chat),
)  # fmt: skip
COMMANDS_BY_NAME = {command.name: command for command in COMMANDS}
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}
