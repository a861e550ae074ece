"""Record a chat in the terminal as text and SVG: ``python -m examples.record_chat.record OUT``."""

import argparse
import json
import re
import shutil
import tempfile
from html import escape
from pathlib import Path

from examples.record_chat.terminal_program import TerminalProgram
from internvl3_mlx.loading.resolve import DEMO_FOLDER

WIDTH = 100
BANNER = "(?m)^(╭|model  )"  # its beginning; notes about the model come before it
PROMPT = "› "
CELL, LINE, MARGIN = 8.43, 19, 16  # pixels of a 14-pixel monospaced letter
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
COLORS = {"background": "#1e1e2e", "text": "#cdd6f4", "dim": "#7f849c", "prompt": "#89b4fa"}


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(words)
    with tempfile.TemporaryDirectory() as folder:
        questions = copy_samples(Path(folder))
        lines = args.lines or questions
        screen = run_chat(lines, args.model, args.max_tokens, Path(folder), args.columns)
    args.out.with_suffix(".txt").write_text("\n".join(screen) + "\n", encoding="utf-8")
    args.out.with_suffix(".svg").write_text(draw_screen(screen, args.columns), encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("record", description=__doc__)
    parser.add_argument("out", type=Path, help="output path without a suffix")
    parser.add_argument("lines", nargs="*", help="lines to type (default: demo questions)")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--columns", type=int, default=WIDTH, help="width of the terminal")
    return parser


def copy_samples(folder: Path) -> list[str]:
    """Copy the demo's images into ``folder`` and return a line with a question about each."""
    table = json.loads((DEMO_FOLDER / "samples" / "samples.json").read_text("utf-8"))
    for entry in table:
        shutil.copy(DEMO_FOLDER / "samples" / entry["file"], folder)
    return [f"{entry['file']} {entry['question']}" for entry in table]


def run_chat(
    lines: list[str], model: str, max_tokens: int, folder: Path, columns: int
) -> list[str]:
    """Type the lines one after another, each at a new prompt; return the lines of the screen."""
    words = ("chat", "--no-history", "--model", model, "--max-tokens", str(max_tokens))
    program = TerminalProgram(*words, cwd=folder, columns=columns, HF_HUB_OFFLINE="1", NO_COLOR="1")
    try:
        for number, line in enumerate(lines, start=1):
            program.wait_for(f"(?m)^{PROMPT.strip()}", number)
            program.type(line + "\r")
            program.wait_for(f"(?m)^{PROMPT.strip()}", number + 1)
        screen = program.wait_for(f"(?m)^{PROMPT.strip()}", len(lines) + 1)
    finally:
        program.close()
    banner = re.search(BANNER, screen)
    *shown, _ = screen[banner.start() if banner else 0 :].rstrip().split("\n")  # an empty prompt
    return without_suggestions(shown)


def without_suggestions(screen: list[str]) -> list[str]:
    """Leave out what the demo suggests to try, lines that it wraps included."""
    found, suggests = list[str](), False
    for line in screen:
        suggests = line.startswith("try ") or (suggests and line.startswith("     "))
        if not suggests:
            found.append(line)
    return found


def draw_screen(screen: list[str], columns: int = WIDTH) -> str:
    """Draw the screen as SVG, with banner and statistics dimmed."""
    height = len(screen) * LINE + 2 * MARGIN
    width = round(columns * CELL) + 2 * MARGIN
    rows = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + 14}" fill="{line_color(line)}" '
        f'xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(screen)
        if line
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{FONT}" font-size="14">',
            f'<rect width="100%" height="100%" rx="8" fill="{COLORS["background"]}"/>',
            *rows,
            "</svg>\n",
        ]
    )


def line_color(line: str) -> str:
    if line.startswith(PROMPT):
        return COLORS["prompt"]
    is_banner = line[:1] in "╭│╰"
    return COLORS["dim"] if is_banner or " · " in line else COLORS["text"]


if __name__ == "__main__":
    main()
