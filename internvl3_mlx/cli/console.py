"""All output. Answers go to stdout, everything else to stderr; no other module prints."""

import os
import shutil
import sys
import threading
import time
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from internvl3_mlx.cli.layout import fit_width, table_lines, wrap_text
from internvl3_mlx.cli.visible import json_text, visible, visible_name, without_controls
from internvl3_mlx.disk import format_bytes

if TYPE_CHECKING:
    from internvl3_mlx.vlm import Answer

GB, MB, KB = 1e9, 1e6, 1e3
SPINNER_DELAY_S = 0.5  # a wait shorter than this shows nothing
SPINNER_INTERVAL_S = 0.1
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
CLEAR_LINE = "\r\x1b[2K"


def is_interactive(stream: TextIO | None) -> bool:
    """Return whether ``stream`` is a terminal that can be redrawn and colored."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def supports_color(stream: TextIO) -> bool:
    """Return whether ``stream`` may be colored: a terminal, and NO_COLOR is unset or empty."""
    return is_interactive(stream) and not os.environ.get("NO_COLOR")


def write_answer(text: str) -> None:
    """Write generated text to stdout: unchanged when piped, never interpreted as markup."""
    sys.stdout.write(without_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_thought(text: str, *, ended: bool = False) -> None:
    """Write a piece of a thought, dim, on a terminal's stderr; elsewhere, nothing.

    ended: end it with a blank line.
    """
    if is_interactive(sys.stderr):
        shown = _paint(without_controls(text), dim=True) if text else ""
        sys.stderr.write(shown + "\n\n" * ended)
        sys.stderr.flush()


def write_line(text: str = "") -> None:
    """Write one line of output to stdout."""
    print("\n".join(wrap_words(visible(text), sys.stdout)), flush=True)


def show_transient(text: str) -> None:
    """Show a line on a terminal until the next one; an empty one clears it. Elsewhere, nothing."""
    if is_interactive(sys.stderr):
        shown = fit_width(visible_name(text), _last_column())
        sys.stderr.write(CLEAR_LINE + (_paint(shown, dim=True) if shown else ""))
        sys.stderr.flush()


def write_escape_sequence(sequence: str) -> None:
    """Write an escape sequence to the terminal, such as an image."""
    sys.stdout.write(sequence)
    sys.stdout.flush()


# how the parts of a training sample are printed: colored on a terminal, between marks elsewhere
SEGMENT_STYLES: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "context": ({"dim": True}, "", ""),
    "image": ({"fg": "cyan"}, "", ""),
    "in_loss": ({"fg": "green", "bold": True}, "»", "«"),
    "rejected": ({"fg": "red"}, "›", "‹"),
}


def write_segments(parts: Sequence[tuple[str, str]]) -> None:
    """Write text whose parts differ in style, with a legend below."""
    colored = supports_color(sys.stdout)
    for text, style in parts:
        look, opening, closing = SEGMENT_STYLES[style]
        shown = visible(text)
        sys.stdout.write(click.style(shown, **look) if colored else opening + shown + closing)
    print(flush=True)
    used = {style for _, style in parts}
    legend = {
        "in_loss": "green is in the loss" if colored else "»in the loss«",
        "rejected": "red is the rejected answer" if colored else "›rejected answer‹",
    }
    hint(" · ".join(text for style, text in legend.items() if style in used))


# a step that a critic scored: green from here on, yellow, and red below the second
GOOD_SCORE, DOUBTFUL_SCORE = 0.7, 0.4


def write_scored(text: str, score: float, reply: str | None = None) -> None:
    """Write a scored text after its score, its lines indented, colored on a terminal.

    reply: shown in place of the score, which is 0 for a good one.
    """
    good = score >= 0 if reply is not None else score >= GOOD_SCORE
    doubtful = reply is None and score >= DOUBTFUL_SCORE
    label = f"{score:.3f}" if reply is None else reply[:5]
    shown = f"{visible(label):<5}  " + visible(text).replace("\n", "\n" + " " * 7)
    color = "green" if good else "yellow" if doubtful else "red"
    print(click.style(shown, fg=color) if supports_color(sys.stdout) else shown, flush=True)


def write_heading(name: str) -> None:
    """Write the heading of one of several answers."""
    print(f"== {visible_name(name)}", flush=True)


def print_json(content: object, *, indent: int | None = None) -> None:
    """Write ``content`` to stdout as JSON: on one line, or indented for reading."""
    sys.stdout.write(json_text(content, indent=indent) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a note that needs no action."""
    _print_message(text, _paint("note:", fg="yellow"), "note: ")


def error(text: str) -> None:
    """Write why something failed."""
    _print_message(text, _paint("error:", fg="red", bold=True), "error: ")


def hint(text: str) -> None:
    """Write a dim line: advice, or details the user did not ask for."""
    for line in wrap_words(visible(text), sys.stderr):
        print(_paint(line, dim=True), file=sys.stderr)


def _print_message(text: str, label: str, plain_label: str) -> None:
    """Write a message after its label, wrapped at words on a terminal."""
    first, *rest = wrap_words(plain_label + visible(text), sys.stderr)
    print("\n".join([f"{label} {first.removeprefix(plain_label)}", *rest]), file=sys.stderr)


def wrap_words(text: str, stream: TextIO) -> list[str]:
    """Split text into lines at words if ``stream`` is a terminal that is too narrow for it."""
    width = columns_of(stream)
    return [text] if width is None else wrap_text(text, width)


def columns_of(stream: TextIO | None) -> int | None:
    """Return the width of a terminal; None for anything else, which is not wrapped."""
    return shutil.get_terminal_size().columns if is_interactive(stream) else None


def print_traceback(fault: BaseException) -> None:
    """Write the full traceback, for --debug."""
    print(visible("".join(tracebacks.format_exception(fault)).rstrip()), file=sys.stderr)


def end_line() -> None:
    """End a partial line, so that the shell prompt starts on a new one."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def print_stats(answer: "Answer") -> None:
    """Write the statistics of an answer on one dim line."""
    hint(format_stats(answer))


def format_stats(answer: "Answer") -> str:
    """Format the statistics of an answer: ``18 tokens · 61.3 tok/s · prompt 2,041 …``."""
    usage, timing = answer.usage, answer.timing
    parts = [f"{usage.image_tokens:,} image"] if usage.image_tokens else []
    if compressed := getattr(answer, "compressed_tiles", None):  # (compressed, all)
        parts.append("{} of {} tiles compressed".format(*compressed))
    parts += [f"{usage.cached_tokens:,} cached"] if getattr(usage, "cached_tokens", 0) else []
    images = f" ({', '.join(parts)})" if parts else ""
    drafted = getattr(usage, "drafted_tokens", 0)
    accepted = (
        f"{usage.accepted_tokens / drafted:.0%} of {drafted:,} draft tokens accepted"
        if drafted
        else ""
    )
    compiled = getattr(usage, "compiled_tokens", 0)
    prompt_s = timing.preprocess_s + timing.vision_s + timing.prefill_s
    parts_of_line = [
        format_count(usage.completion_tokens, "token"),
        f"{timing.decode_tps:,.1f} tok/s" if timing.decode_tps else "",  # one token has no rate
        f"prompt {usage.prompt_tokens:,}{images} in {prompt_s:.1f} s",
        f"peak {format_size(answer.peak_memory_gb * GB)}",
        f"held {format_size(answer.held_memory_gb * GB)}",
        accepted,
        f"{compiled:,} by a compiled step" if compiled else "",
        describe_kernel(getattr(usage, "kernel_speedup", 0.0)),
    ]
    return " · ".join(filter(None, parts_of_line))


def describe_kernel(speedup: float) -> str:
    """Say whose attention decoded, and how many times faster our kernel was measured."""
    from internvl3_mlx.metal_kernels.registry import MIN_SPEEDUP

    if not speedup:
        return ""
    whose = "our kernel" if speedup >= MIN_SPEEDUP else "MLX"
    return f"attention by {whose} ({speedup:.2f}x with our kernel)"


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun: ``1 tile``, ``2,048 tiles``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_size(nbytes: float) -> str:
    """Format a size in decimal units, as disks and the hub do: 4.2 GB, 7.4 MB."""
    return f"{nbytes / KB:,.1f} kB" if 0 < nbytes < MB / 20 else format_bytes(nbytes)


def print_table(table: Mapping[str, object]) -> None:
    """Print names and values in two columns; nested tables are indented below their name."""
    for line in table_lines(table, columns_of(sys.stdout)):
        print(line, flush=True)


@contextmanager
def spinner(text: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show ``text`` and the elapsed seconds on stderr until the block ends or sends a note.

    Yields the function that the block calls with a note. The first note ends the spinner for good,
    so that what it announces, such as a download with its own progress bars, has the screen.
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
        mark, elapsed = SPINNER[count % len(SPINNER)], f" · {seconds:.0f} s"
        space = max(_last_column() - len(mark) - 1 - len(elapsed), 1)
        sys.stderr.write(f"{CLEAR_LINE}{mark} {fit_width(visible_name(text), space)}{elapsed}")
        sys.stderr.flush()
        count += 1
    sys.stderr.write(CLEAR_LINE)
    sys.stderr.flush()


def _last_column() -> int:
    """Return how many cells a line may have that is cleared again: it must not wrap."""
    return max(shutil.get_terminal_size().columns - 1, 1)


def _paint(text: str, *, fg: str | None = None, bold: bool = False, dim: bool = False) -> str:
    text = visible(text)
    if not supports_color(sys.stderr):
        return text
    return click.style(text, fg=fg, bold=bold or None, dim=dim or None)
