"""Record a talk in the terminal as text and SVG: ``python -m examples.record_talk.record OUT``."""

import argparse
import json
import shutil
import tempfile
from html import escape
from pathlib import Path

from examples.record_talk.talk_terminal import Program
from internvl3_mlx.loading.resolve import DEMO_FOLDER

WIDTH = 100
CORNER = "╭"  # of the first screen; notes about the model stand before it
FIGURES = r"\d+ tokens? · .*prompt \d"
PROMPT = "› "
CELL, LINE, MARGIN = 8.43, 19, 16  # pixels of a 14 pixel monospaced letter
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
COLOURS = {"ground": "#1e1e2e", "text": "#cdd6f4", "dim": "#7f849c", "prompt": "#89b4fa"}


def main(words: list[str] | None = None) -> None:
    asked = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        pictures = samples(Path(folder))
        lines = asked.lines or pictures
        screen = hold(lines, asked.model, asked.max_tokens, Path(folder))
    asked.out.with_suffix(".txt").write_text("\n".join(screen) + "\n", encoding="utf-8")
    asked.out.with_suffix(".svg").write_text(drawn(screen), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("record", description=__doc__)
    made.add_argument("out", type=Path, help="where to write, without a suffix")
    made.add_argument("lines", nargs="*", help="what to say; by default about the demo's pictures")
    made.add_argument("--model", default="demo")
    made.add_argument("--max-tokens", type=int, default=64)
    return made


def samples(folder: Path) -> list[str]:
    """Copy the demo's pictures to where short names find them, and give a question about each."""
    table = json.loads((DEMO_FOLDER / "samples" / "samples.json").read_text("utf-8"))
    for entry in table:
        shutil.copy(DEMO_FOLDER / "samples" / entry["file"], folder)
    return [f"{entry['file']} {entry['question']}" for entry in table]


def hold(lines: list[str], model: str, max_tokens: int, folder: Path) -> list[str]:
    """Say the lines one after another, each when the program asks for it; return the screen."""
    words = ("chat", "--model", model, "--max-tokens", str(max_tokens))
    program = Program(*words, cwd=folder, columns=WIDTH, HF_HUB_OFFLINE="1", NO_COLOR="1")
    try:
        for number, line in enumerate(lines, start=1):
            program.wait_for(f"(?m)^{PROMPT.strip()}", number)
            program.type(line + "\r")
            program.wait_for(FIGURES, number)
        screen = program.wait_for(f"(?m)^{PROMPT.strip()}", len(lines) + 1)
    finally:
        program.close()
    *shown, _ = screen[screen.index(CORNER) :].rstrip().split("\n")  # the last prompt is empty
    return [line for line in unwrapped(shown) if not line.startswith("try ")]


def unwrapped(screen: list[str]) -> list[str]:
    """Join the advice that the terminal broke, so that it can be left out whole."""
    found: list[str] = []
    for line in screen:
        if found and found[-1].startswith("try ") and len(found[-1]) % WIDTH == 0:
            found[-1] += line
        else:
            found.append(line)
    return found


def drawn(screen: list[str]) -> str:
    """Draw the screen as SVG: dim what the program says about itself."""
    height = len(screen) * LINE + 2 * MARGIN
    width = round(WIDTH * CELL) + 2 * MARGIN
    rows = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + 14}" fill="{colour(line)}" '
        f'xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(screen)
        if line
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{FONT}" font-size="14">',
            f'<rect width="100%" height="100%" rx="8" fill="{COLOURS["ground"]}"/>',
            *rows,
            "</svg>\n",
        ]
    )


def colour(line: str) -> str:
    if line.startswith(PROMPT):
        return COLOURS["prompt"]
    about = line[:1] in "╭│╰" or " · " in line
    return COLOURS["dim"] if about else COLOURS["text"]


if __name__ == "__main__":
    main()
