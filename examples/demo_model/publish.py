"""Put a converted model into the package: its card, with measured figures, and sample pictures.

``python -m examples.demo_model.publish --model converted --table table.json --out DEMO_FOLDER``

Several tables that were measured side by side, each with its own columns or tasks, become one.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.demo_model.batches import POLICY, tile_total
from examples.demo_model.heldout import (
    COLUMNS,
    HELD_OUT_COLUMNS,
    ON_ICON_SETS,
    TASKS,
    Column,
    drawer,
    enlarge,
)
from examples.demo_model.questions import TEMPLATES
from examples.demo_model.scenes import SEEN, Cell, Thing, draw
from examples.demo_model.vocabulary import CATEGORIES, COLORS, NAMES, SHAPES
from internvl3_mlx.records.json_values import write_json

SAMPLE_SEED = 10  # training uses 1, evaluation 2; with 3 the crabs were miscounted
SCALE = 2
GATE, LEAD = 0.90, 0.40  # held-out accuracy, and its lead over the control, of what it can do
ROOM = (0.50, 0.85)  # between these a task is named as one that more training can still improve
CARD_PATH = Path(__file__).parent / "card.md"
Plan = list[tuple[Thing, Cell]]

# File -> (size, plan, question, answer). Places are pixels before enlarging.
SAMPLES: dict[str, tuple[tuple[int, int], Plan, str, str]] = {
    "dog.jpg": (
        (224, 224),
        [(Thing("object", "dog"), Cell(112, 114, 150))],
        "What is this?",
        "dog",
    ),
    "four_corners.jpg": (
        (240, 240),
        [
            (Thing("object", "rocket"), Cell(62, 60, 96)),
            (Thing("object", "apple"), Cell(180, 64, 90)),
            (Thing("object", "turtle"), Cell(58, 180, 98)),
            (Thing("object", "guitar"), Cell(182, 178, 100)),
        ],
        "Where is the turtle?",
        "bottom left",
    ),
    "crabs.jpg": (
        (240, 200),
        [
            (Thing("object", "crab"), Cell(60, 52, 84)),
            (Thing("object", "crab"), Cell(178, 58, 80)),
            (Thing("object", "crab"), Cell(120, 150, 86)),
        ],
        "How many crabs are there?",
        "3",
    ),
    "shapes.jpg": (
        (256, 144),
        [
            (Thing("shape", "star", "yellow"), Cell(64, 72, 84)),
            (Thing("shape", "circle", "blue"), Cell(192, 70, 80)),
        ],
        "What color is the star?",
        "yellow",
    ),
    "pineapple.jpg": (
        (180, 240),
        [(Thing("object", "pineapple"), Cell(92, 124, 150))],
        "What kind of thing is this?",
        "fruit",
    ),
    "phone.jpg": (
        (112, 236),
        [
            (Thing("object", "cat"), Cell(56, 60, 84)),
            (Thing("object", "umbrella"), Cell(58, 178, 86)),
        ],
        "Is there a cat?",
        "yes",
    ),
}


def main() -> None:
    """Write the card and the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--table", type=Path, nargs="+", required=True, help="what evaluate wrote with --out"
    )
    parser.add_argument("--abilities", type=Path, help="what abilities wrote with --out")
    parser.add_argument("--model", type=Path, help="converted checkpoint to copy into --out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.model:
        copy_checkpoint(options.model, options.out)
    write_samples(options.out / "samples")
    table = joined([json.loads(path.read_text()) for path in options.table])
    found = json.loads(options.abilities.read_text()) if options.abilities else {}
    (options.out / "README.md").write_text(card(table, found))
    if options.model:
        (options.model.parent / "published").touch()  # recipe.py looks for it


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy configuration, weights and tokenizer, each put in place whole."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (*source.glob("*.json"), *source.glob("*.safetensors")):
        aside = out / f"{path.name}.new"
        shutil.copyfile(path, aside)
        aside.replace(out / path.name)


def joined(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one table of several; all must have asked the same number of questions per task."""
    numbers = {table["items"] for table in tables}
    if len(numbers) > 1:
        raise SystemExit(f"the tables have {sorted(numbers)} items a task; measure all with one")
    whole: dict[str, Any] = {"items": numbers.pop()}
    for table in tables:
        for name, scores in table.items():
            if name != "items":
                whole[name] = whole.get(name, {}) | scores
    return whole


def write_samples(folder: Path) -> None:
    """Draw the sample pictures and list them with a question and its right answer."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (size, plan, _, _)) in enumerate(SAMPLES.items()):
        random = np.random.default_rng((SAMPLE_SEED, number))
        sample(random, size, plan).save(folder / name, quality=88)
    listed = [
        {"file": name, "question": question, "answer": answer}
        for name, (_, _, question, answer) in SAMPLES.items()
    ]
    write_json(folder / "samples.json", listed)


def sample(random: np.random.Generator, size: tuple[int, int], plan: Plan) -> Image.Image:
    """Draw one sample picture."""
    return enlarge(draw(random, size, plan, SEEN, drawer(SEEN)).pixels, SCALE)


def card(table: dict[str, Any], abilities: dict[str, Any] | None = None) -> str:
    """Write the model card from the measured table and the measured abilities."""
    square = table["square"]
    reported = [task for task in TASKS if passes(square[task])]
    room = [task for task in TASKS if ROOM[0] <= square[task]["right"] <= ROOM[1]]
    rest = [task for task in TASKS if task not in reported]
    shown = reported or list(TASKS)  # where nothing passes, all is shown
    return CARD_PATH.read_text().format(
        reported=rows(reported, square),
        rest=rows(rest, square),
        room=", ".join(f"*{task}* ({percent(square[task]['right'])})" for task in room),
        columns=columns(shown, table),
        deltas=deltas(shown, table),
        icon_sets=icon_sets(table),
        abilities=ability_rows(abilities or {}),
        number=table["items"],
        delta_number=table["deltas"]["items"],
        names=", ".join(NAMES),
        categories=", ".join(CATEGORIES),
        colors=", ".join(COLORS),
        shapes=", ".join(SHAPES),
    )


def passes(score: dict[str, float]) -> bool:
    """Say whether a task is good enough to be reported."""
    return score["right"] >= GATE and score["right"] - score["swapped"] >= LEAD


def percent(share: float) -> str:
    """Write a share as a whole percentage."""
    return f"{100 * share:.0f}%"


def rows(tasks: list[str], square: dict[str, dict[str, float]]) -> str:
    """Write one table row per task: an example question, accuracy, control."""
    blanks = {"count": "dogs", "at": "top left", "shape": "red", "color": "star"}
    lines = []
    for task in tasks:
        text = TEMPLATES[task][0].format(x=blanks.get(task, "dog"), a="a dog")
        score = square[task]
        lines.append(
            f"| {task} | {text} | {percent(score['right'])} | {percent(score['swapped'])} |"
        )
    return "\n".join(lines)


def columns(reported: list[str], table: dict[str, Any]) -> str:
    """Write the held-out columns, one line each, for the reported tasks."""
    lines = [
        "| pictures | tiles | " + " | ".join(reported) + " | mean |",
        "|---" * (len(reported) + 3) + "|",
    ]
    for name in COLUMNS:
        if name in table:
            shares = [table[name][task]["right"] for task in reported]
            cells = [percent(share) for share in [*shares, sum(shares) / len(shares)]]
            lines.append(f"| {name} | {tiles(COLUMNS[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def icon_sets(table: dict[str, Any]) -> str:
    """Write accuracy on the icon sets that no training saw, the controls in brackets."""
    measured = [name for name in HELD_OUT_COLUMNS if name in table]
    if not measured:
        return "Not measured for these weights."
    lines = [
        "| icon set | " + " | ".join(ON_ICON_SETS) + " | mean |",
        "|---" * (len(ON_ICON_SETS) + 2) + "|",
    ]
    for name in measured:
        scores = [table[name][task] for task in ON_ICON_SETS]
        cells = [f"{percent(s['right'])} ({percent(s['swapped'])})" for s in scores]
        mean = percent(sum(s["right"] for s in scores) / len(scores))
        lines.append(f"| {name.split(',')[0]} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def ability_rows(abilities: dict[str, Any]) -> str:
    """Write accuracy of what goes beyond one question about one image."""
    if not abilities:
        return "Not measured for these weights."
    lines = ["| ability | right | control |", "|---|---|---|"]
    for name, score in abilities.items():
        lines.append(f"| {name} | {percent(score['right'])} | {percent(score['swapped'])} |")
    return "\n".join(lines)


def tiles(column: Column) -> int:
    """Count the tiles that a column's pictures are cut into, the thumbnail among them."""
    return tile_total(POLICY.grid(*(side * column.scale for side in column.size)))


def deltas(reported: list[str], table: dict[str, Any]) -> str:
    """Write accuracy at each V2PE delta."""
    by_task = {task: table["deltas"][task] for task in reported}
    names = list(next(iter(by_task.values())))
    lines = ["| delta | " + " | ".join(reported) + " |", "|---" * (len(reported) + 1) + "|"]
    for name in names:
        cells = " | ".join(percent(by_task[task][name]) for task in reported)
        lines.append(f"| {name.removesuffix('/1')} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
