"""``internvl3 eval synthetic``: rendered images with known answers, nothing to download."""

from pathlib import Path
from typing import Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.eval_run import RUN_FLAGS, run_evaluation
from internvl3_mlx.cli.flags import Function, SectionedCommand, apply_flags, flag

ITEMS = 50
SET_NAMES = ("words", "page", "table", "bars", "line", "counting", "position", "difference")


def run_flags(command: Function) -> Function:
    return apply_flags(RUN_FLAGS, command)


@click.command(
    "synthetic",
    cls=SectionedCommand,
    short_help="Evaluate on rendered images with known answers.",
    examples=(
        ("internvl3 eval synthetic --model 2b", "all sets, 50 images each"),
        ("internvl3 eval synthetic words table --model 2b --q-bits 16", "two of them, at 16 bits"),
        ("internvl3 eval synthetic words --save rendered", "write the images, ask nobody"),
    ),
    suggestions={"-q": "--quiet", "--limit": "--items", "--quantize": "--q-bits"},
)
@click.argument("sets", nargs=-1, metavar="[SETS]...")
@flag(
    "Data", "--items", "count", metavar="N", type=click.IntRange(1, 10_000), default=ITEMS,
    show_default=True, help="Number of images of each set.",
)  # fmt: skip
@flag(
    "Data",
    "--seed",
    "seed",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Other images for another seed.",
)
@flag(
    "Data",
    "--fonts",
    "fonts",
    type=click.Choice(("system", "pillow")),
    default="system",
    show_default=True,
    help="pillow: only the font that Pillow carries, the same on all machines.",
)
@flag(
    "Data",
    "--save",
    "save",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write images and questions to a folder instead of asking a model.",
)
@flag(
    "Question",
    "--prompt",
    "prompt",
    metavar="TEXT",
    help="Prompt with {question}; by default it asks for a word or phrase.",
)
@options.GENERATION_FLAGS["max_tiles"]
@options.load_flags
@run_flags
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def synthetic_command(sets: tuple[str, ...], save: Path | None, **given: Any) -> None:
    """Evaluate on images rendered here: words, a page, a table, charts, counting, positions.

    SETS are words, page, table, bars, line, counting, position and difference; all without any.
    Answers are known exactly, so faults of tiles, resizing, prompt and quantization show at once.
    The scores do not replace those of published benchmarks. Fonts are those of this machine and
    part of the result; charts show real numbers where vega-datasets is installed.
    """
    from internvl3_mlx.evaluation.setup import EvalOptions, plan_synthetic
    from internvl3_mlx.evaluation.synthetic.sets import SyntheticItems, check_sets

    source = SyntheticItems(
        check_sets(sets), given["count"], given["seed"], only_pillow=given["fonts"] == "pillow"
    )
    if save is not None:
        from internvl3_mlx.evaluation.synthetic.save import save_items

        save_items(source, save)
        console.write_line(f"{len(source.entries):,} questions in {save / 'questions.jsonl'}")
        return
    plan = plan_synthetic(
        EvalOptions(task="synthetic", prompt=given["prompt"], max_tiles=given["max_tiles"]), source
    )
    run_evaluation(plan, {**given, "judge": "none", "best_of_options": {}})
