"""What people see. Answers go to stdout, all else to stderr; nothing else in the package prints."""

import json
import os
import sys
import threading
import time
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from internvl3_mlx.generation.vlm import Answer

GB, MB = 1e9, 1e6
SPINNER_DELAY_S = 0.5  # a wait shorter than this shows nothing
SPINNER_INTERVAL_S = 0.1
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
CLEAR_LINE = "\r\x1b[2K"
# A terminal obeys control characters, so a model's text must not bring any but tab and line end.
CONTROL_CHARACTERS = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}


def is_interactive(stream: TextIO) -> bool:
    """Tell whether ``stream`` is a terminal that may be redrawn and coloured."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def supports_color(stream: TextIO) -> bool:
    """Tell whether ``stream`` may carry colour: a terminal, and NO_COLOR is unset or empty."""
    return is_interactive(stream) and not os.environ.get("NO_COLOR")


def write_answer(text: str) -> None:
    """Write a piece of the model's text to stdout: as it is when piped, never read as markup."""
    sys.stdout.write(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_line(text: str = "") -> None:
    """Write one line of output to stdout."""
    print(text, flush=True)


def show_transient(text: str) -> None:
    """Show one line on a terminal until the next; an empty one clears it. Elsewhere nothing."""
    if is_interactive(sys.stderr):
        sys.stderr.write(CLEAR_LINE + (_paint(text, dim=True) if text else ""))
        sys.stderr.flush()


def write_escape_sequence(sequence: str) -> None:
    """Send a terminal its own language, such as a picture."""
    sys.stdout.write(sequence)
    sys.stdout.flush()


# how a training sample is written out: colour on a terminal, marks around it elsewhere
SEGMENT_STYLES: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "read": ({"dim": True}, "", ""),
    "image": ({"fg": "cyan"}, "", ""),
    "learned": ({"fg": "green", "bold": True}, "»", "«"),
    "rejected": ({"fg": "red"}, "›", "‹"),
}


def write_segments(parts: Sequence[tuple[str, str]]) -> None:
    """Write a text whose parts differ in style, and below it what the styles mean."""
    coloured = supports_color(sys.stdout)
    for text, style in parts:
        look, opening, closing = SEGMENT_STYLES[style]
        shown = text.translate(CONTROL_CHARACTERS)
        sys.stdout.write(click.style(shown, **look) if coloured else opening + shown + closing)
    print(flush=True)
    used = {style for _, style in parts}
    legend = {
        "learned": "green is learned" if coloured else "»learned«",
        "rejected": "red is the rejected answer" if coloured else "›rejected answer‹",
    }
    hint(" · ".join(text for style, text in legend.items() if style in used))


def write_heading(name: str) -> None:
    """Begin the answer about one of several pictures."""
    print(f"== {name}", flush=True)


def print_json(content: object, *, indent: int | None = None) -> None:
    """Write ``content`` to stdout as JSON: on one line, or indented for reading."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell something the user should know and need not act upon."""
    print(f"{_paint('note:', fg='yellow')} {text}", file=sys.stderr)


def error(text: str) -> None:
    """Tell why the command failed."""
    print(f"{_paint('error:', fg='red', bold=True)} {text}", file=sys.stderr)


def hint(text: str) -> None:
    """Add where to look, below an error."""
    print(_paint(text, dim=True), file=sys.stderr)


def print_traceback(fault: Exception) -> None:
    """Write the whole traceback, for --debug."""
    print("".join(tracebacks.format_exception(fault)).rstrip(), file=sys.stderr)


def end_line() -> None:
    """Leave a half-written line behind, so that the shell's prompt starts on its own."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def print_stats(answer: "Answer") -> None:
    """Write the run's figures on one dim line: tokens, speed, prompt and memory."""
    print(_paint(format_stats(answer), dim=True), file=sys.stderr)


def format_stats(answer: "Answer") -> str:
    """Put the figures of a run in one line, such as ``18 tokens · 61.3 tok/s · prompt 2,041 …``."""
    usage, timing = answer.usage, answer.timing
    parts = [f"{usage.image_tokens:,} image"] if usage.image_tokens else []
    parts += [f"{usage.cached_tokens:,} kept"] if getattr(usage, "cached_tokens", 0) else []
    images = f" ({', '.join(parts)})" if parts else ""
    drafted = getattr(usage, "drafted_tokens", 0)
    guesses = (
        f"{usage.accepted_tokens / drafted:.0%} of {drafted:,} guesses right" if drafted else ""
    )
    prompt_s = timing.preprocess_s + timing.vision_s + timing.prefill_s
    told = [
        f"{usage.completion_tokens:,} token{'s' * (usage.completion_tokens != 1)}",
        f"{timing.decode_tps:,.1f} tok/s" if timing.decode_tps else "",  # one token has no rate
        f"prompt {usage.prompt_tokens:,}{images} in {prompt_s:.1f} s",
        f"peak {format_size(answer.peak_memory_gb * GB)}",
        guesses,
    ]
    return " · ".join(filter(None, told))


def format_size(nbytes: float) -> str:
    """Put a size in units of 1000, as disks and the hub count: 4.2 GB, 7.4 MB."""
    return f"{nbytes / GB:,.1f} GB" if nbytes >= GB / 2 else f"{nbytes / MB:,.1f} MB"


def print_table(table: Mapping[str, object], *, margin: str = "") -> None:
    """Write names and values in two columns; tables and lists of tables are indented below."""
    width = max((len(name) for name, value in table.items() if not _is_table(value)), default=0)
    for name, value in table.items():
        label = name.replace("_", " ") if name.isidentifier() else name  # a token is kept as it is
        if not _is_table(value):
            print(f"{margin}{label:<{width}}  {_format_cell(value)}", flush=True)
        elif isinstance(value, Mapping):
            print(f"{margin}{label}", flush=True)
            print_table(value, margin=margin + "  ")
        elif isinstance(value, Sequence):
            print(f"{margin}{label}", flush=True)
            _print_columns(value, margin + "  ")


@contextmanager
def spinner(text: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show ``text`` and the seconds on stderr until the body ends or has something to say.

    Yields the function that the body calls with a note. The first note ends the display for good,
    so that whatever it announces, such as a download with bars of its own, has the screen.
    """
    over = threading.Event()
    ticker = threading.Thread(target=_spin, args=(text, over), daemon=True)
    if not quiet and is_interactive(sys.stderr):
        ticker.start()

    def finish() -> None:
        over.set()
        if ticker.is_alive():
            ticker.join()

    def notify(message: str) -> None:
        finish()
        if not quiet:
            note(message)

    try:
        yield notify
    finally:
        finish()


def _spin(text: str, over: threading.Event) -> None:
    start, count = time.monotonic(), 0
    if over.wait(SPINNER_DELAY_S):
        return
    while not over.wait(SPINNER_INTERVAL_S):
        seconds = time.monotonic() - start
        sys.stderr.write(f"{CLEAR_LINE}{SPINNER[count % len(SPINNER)]} {text} · {seconds:.0f} s")
        sys.stderr.flush()
        count += 1
    sys.stderr.write(CLEAR_LINE)
    sys.stderr.flush()


def _paint(text: str, *, fg: str | None = None, bold: bool = False, dim: bool = False) -> str:
    if not supports_color(sys.stderr):
        return text
    return click.style(text, fg=fg, bold=bold or None, dim=dim or None)


def _is_table(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and any(isinstance(row, Mapping) for row in value)


def _print_columns(rows: Sequence[Mapping[str, object]], margin: str) -> None:
    """Write rows that share their names as columns, figures to the right."""
    names = list(rows[0])
    cells = [[_format_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(names)]
    right = [all(isinstance(row.get(name), (int, float)) for row in rows) for name in names]
    for row in [[name.replace("_", " ") for name in names], *cells]:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        print((margin + "  ".join(padded)).rstrip(), flush=True)


def _format_cell(value: object) -> str:
    """Put a value in words: figures with thousands marked, lists with commas, nothing as a dash."""
    if value is None or value == "" or value == () or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_format_cell(item) for item in value)
    return str(value)
