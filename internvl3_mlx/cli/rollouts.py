"""``internvl3 rollouts``: training data for a critic and for MPO from one's own questions."""

from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, generation_fields, options, progress
from internvl3_mlx.cli.flags import SectionedCommand, apply_flags, flag
from internvl3_mlx.cli.load_model import load_vlm
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.test_time_scaling.rollout_files import RolloutSummary
    from internvl3_mlx.test_time_scaling.rollout_questions import KnownQuestion

GENERATION = ("system", "max_tokens", "temperature", "top_p", "top_k", "max_tiles", "v2pe_delta")
COUNT = click.IntRange(min=1)
# ROLLOUT_DEFAULTS as the help shows them; those would import the model
SHOWN_DEFAULTS = {"temperature": "1", "top_k": "50", "max_tokens": "4096"}
ROLLOUT_FLAGS = (
    flag(
        "Data", "-n", "--samples", "samples", metavar="N", type=COUNT,
        help="Responses to each question.", show_default="8",
    ),
    flag(
        "Data", "--judged", "judged", metavar="N", type=click.IntRange(min=0),
        help="Responses of each question whose steps are judged; 0 writes pairs alone.",
        show_default="4",
    ),
    flag(
        "Data", "--continuations", "continuations", metavar="N", type=COUNT,
        help="Continuations from each step.", show_default="16",
    ),
    flag(
        "Data", "--max-steps", "max_steps", metavar="N", type=COUNT,
        help="Join steps if a response has more.", show_default="16",
    ),
    flag(
        "Data", "--early-stop/--no-early-stop", "early_stop", default=None,
        help="Do not continue from steps after one without a correct end.", show_default="on",
    ),
    flag(
        "Question", "--instruction", "prompt", type=click.Choice(("boxed", "cot", "plain")),
        help="What is asked besides the question.", show_default="boxed",
    ),
    flag(
        "Answer", "--seed", "seed", metavar="N", type=click.IntRange(min=0),
        help="Random seed; the same seed gives the same samples.", show_default="0",
    ),
)  # fmt: skip

GENERATION_FLAGS = [
    options.generation_flag(name, SHOWN_DEFAULTS.get(name, "")) for name in GENERATION
]


@click.command(
    cls=SectionedCommand,
    short_help="Make critic and preference data from your questions.",
    examples=(
        ("internvl3 rollouts questions.jsonl -o rollouts --model 2b", "run again to continue"),
        ("internvl3 rollouts questions.csv -o pairs --judged 0 -n 16", "preference pairs alone"),
    ),
    suggestions={"-q": "--quiet", "--num-samples": "--samples"},
)
@click.argument("questions")
@flag(
    "Output", "-o", "--output", "output", metavar="FOLDER",
    help="Folder for rollouts.jsonl, critic.jsonl and pairs.jsonl.",
)  # fmt: skip
@flag("Data", "--limit", "limit", metavar="N", type=COUNT, help="Use the first N questions alone.")
@lambda command: apply_flags(ROLLOUT_FLAGS, command)
@lambda command: apply_flags(GENERATION_FLAGS, command)
@options.load_flags
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def rollouts_command(questions: str, output: str | None, limit: int | None, **flags: Any) -> None:
    """Sample responses to QUESTIONS with known answers, and judge their steps by sampling on.

    QUESTIONS is a file of records with question, answer and image (JSON Lines, JSON, CSV, TSV,
    Parquet). Responses that end in the known answer are correct. critic.jsonl trains a critic
    (train --method prm), pairs.jsonl preferences (train --method mpo). An interrupted run
    continues where it was when the command is given again.
    """
    from internvl3_mlx.test_time_scaling.rollout_questions import read_questions
    from internvl3_mlx.test_time_scaling.rollouts import ROLLOUT_DEFAULTS, RolloutConfig

    if output is None:
        raise UserError("name the folder for the results: -o FOLDER")
    names = [entry.name for entry in fields(RolloutConfig)]
    config = RolloutConfig(**options.only_given({name: flags.pop(name) for name in names}))
    given = options.only_given({name: flags.pop(name) for name in GENERATION})
    generation = {**ROLLOUT_DEFAULTS, **given}
    if not generation["temperature"]:
        raise UserError("at temperature 0 all responses are the same; drop --temp (default 1)")
    generation_fields.make_config(generation)
    source = Path(questions).expanduser()
    known = read_questions(source, limit)
    if not known:
        raise UserError(f"no questions in {questions}")
    summary = run_rollouts(known, config, generation, source, Path(output).expanduser(), flags)
    show_summary(summary, Path(output), as_json=flags["as_json"])


def run_rollouts(
    known: "list[KnownQuestion]",
    config: Any,
    generation: dict[str, Any],
    source: Path,
    folder: Path,
    flags: dict[str, Any],
) -> "RolloutSummary":
    """Do what is left to do, and write the training data of all questions."""
    from internvl3_mlx.test_time_scaling.rollout_files import (
        Journal,
        run_settings,
        write_training_data,
    )
    from internvl3_mlx.test_time_scaling.rollouts import roll_out

    load_options, quiet = flags["load_options"], flags["quiet"]
    model = str(load_options.get("model"))
    journal = Journal(folder, run_settings(config, model, source, generation))
    with closing(journal):
        done = [*journal.rollouts(known)]
        left = [question for question in known if question.number not in journal.rows]
        if done and left and not quiet:
            console.note(f"continuing after {len(done):,} of {len(known):,} questions")
        if left:
            vlm = load_vlm(load_options, quiet=quiet)
            with progress.progress_bar(quiet=quiet) as advance:
                advance("sampling", len(done), len(known))
                events = roll_out(
                    vlm.runner, left, config, generation_fields.make_config(generation)
                )
                for rollouts in events:
                    journal.add(rollouts)
                    done.append(rollouts)
                    correct = sum(one.num_correct for one in done)
                    total = sum(len(one.responses) for one in done)
                    advance(f"sampling · {correct / total:.0%} correct", len(done), len(known))
        finished = sorted(done, key=lambda one: one.question.number)
        return write_training_data(folder, finished)


def show_summary(summary: "RolloutSummary", folder: Path, *, as_json: bool) -> None:
    """Print what was written."""
    if as_json:
        console.print_json({"folder": str(folder), **asdict(summary)})
        return
    console.print_table(
        {
            "questions": summary.questions,
            "responses": summary.responses,
            "correct": f"{summary.correct / max(summary.responses, 1):.1%}",
            "critic rows": f"{summary.critic_rows:,}, {summary.mixed_rows:,} with both labels",
            "preference pairs": summary.pairs,
            "folder": str(folder),
        }
    )
