"""Measure a critic on rows with their own picture, with another one, and with a gray one.

    python -m examples.best_of_demo.controls best-of/critic/best best-of/critic-data/valid.jsonl

A critic that is as often right without the picture judges how an answer reads, and cannot tell a
right candidate for a question from a wrong one that reads as well.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from examples.best_of_demo.rows import parts, read_rows
from internvl3_mlx import Critic, load_critic

GRAY = (128, 128, 128)
Picture = Callable[[Sequence[dict], int, Path], Image.Image]


def main() -> None:
    """Print how often the critic's judgment is right with each kind of picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("critic", help="the folder of a critic")
    parser.add_argument("rows", type=Path, help="validation rows of the critic")
    parser.add_argument("--critic-system", default="", help="as in internvl3 generate")
    options = parser.parse_args()
    critic = load_critic(options.critic, system=options.critic_system)
    rows = read_rows(options.rows)
    print(f"| {len(rows)} rows | its judgment is right |\n|---|---:|")
    for name, picture in PICTURES.items():
        right = [
            is_right(critic, row, picture(rows, number, options.rows.parent))
            for number, row in enumerate(rows)
        ]
        print(f"| {name} | {sum(right) / len(rows):.1%} |", flush=True)


def is_right(critic: Critic, row: dict, picture: Image.Image) -> bool:
    """Whether the critic says of the answer in a row what the row says."""
    question, answer, is_correct = parts(row)
    return (critic.open(question, [picture]).score(answer).score > 0.5) == is_correct


def own(rows: Sequence[dict], number: int, folder: Path) -> Image.Image:
    return Image.open(folder / rows[number]["image"])


def another(rows: Sequence[dict], number: int, folder: Path) -> Image.Image:
    """Open the picture of the next row that has a different one."""
    later = [*rows[number:], *rows[:number]]
    name = next(row["image"] for row in later if row["image"] != rows[number]["image"])
    return Image.open(folder / name)


def gray(rows: Sequence[dict], number: int, folder: Path) -> Image.Image:
    return Image.new("RGB", own(rows, number, folder).size, GRAY)


PICTURES: dict[str, Picture] = {
    "with their own picture": own,
    "with the picture of another row": another,
    "with a gray picture": gray,
}


if __name__ == "__main__":
    main()
