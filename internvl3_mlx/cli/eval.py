"""``internvl3 eval``: benchmarks and data of one's own, with the settings of three harnesses."""

from collections.abc import Callable
from typing import Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.best_of import eval_best_flags
from internvl3_mlx.cli.eval_compare import compare_command
from internvl3_mlx.cli.eval_run import RUN_FLAGS, run_evaluation
from internvl3_mlx.cli.eval_synthetic import synthetic_command
from internvl3_mlx.cli.flags import (
    Function,
    HelpContext,
    SectionedCommand,
    apply_flags,
    flag,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.user_paths import expand_user

PRESET_NAMES = ("internvl", "vlmevalkit", "lmms")
METRIC_NAMES = ("exact", "letter", "relaxed", "anls", "vqa", "contains", "iou", "point")
RUN, SELF = "run", "self"
THE_TASKS = "the task's"  # the default of what a preset sets

DATA_FLAGS = (
    flag(
        "Data", "--data", "data", metavar="PATH",
        help="VLMEvalKit's TSV, Parquet, JSONL, CSV, a folder, or a data set on the Hub.",
    ),
    flag("Data", "--split", "split", metavar="NAME", help="Split of a folder or a Hub data set."),
    flag(
        "Data", "--limit", "limit", metavar="N", type=click.IntRange(min=1),
        help="Evaluate this many items, each category by its share.",
    ),
    flag(
        "Data", "--seed", "seed", metavar="N", type=click.IntRange(min=0), default=0,
        show_default=True, help="Which items --limit selects.",
    ),
)  # fmt: skip
HOW_FLAGS = (
    flag(
        "Question", "--preset", "preset", type=click.Choice(PRESET_NAMES), default="internvl",
        show_default=True, help="Whose prompts, tiles, tokens and parsers are used.",
    ),
    flag(
        "Question", "--metric", "metric", type=click.Choice(METRIC_NAMES),
        help="Metric instead of the task's; for a file of your own exact, or letter with options.",
    ),
    flag(
        "Question", "--prompt", "prompt", metavar="TEXT",
        help='Prompt with {question}, {hint} and {options}, such as "{question} Answer briefly."',
    ),
    options.GENERATION_FLAGS["cot"],
    options.generation_flag("max_tiles", THE_TASKS),
    options.generation_flag("num_frames", THE_TASKS),
    options.generation_flag("max_tokens", THE_TASKS),
)  # fmt: skip
JUDGE_FLAG = (
    flag(
        "Run", "--judge", "judge", metavar="REPO|self|none",
        help="Text model that reads unclear answers where the benchmark has a judge; self is the "
        "model under test.", default=SELF, show_default=True,
    ),
)  # fmt: skip


def flags(*groups: tuple[Callable[[Function], Function], ...]) -> Callable[[Function], Function]:
    return lambda command: apply_flags([each for group in groups for each in group], command)


class RunContext(HelpContext):
    """The context of ``eval TASK``, whose help is that of ``eval``."""

    @property
    def command_path(self) -> str:
        return super().command_path if self.parent is None else self.parent.command_path


class RunCommand(SectionedCommand):
    context_class = RunContext


@click.command(
    RUN,
    cls=RunCommand,
    short_help="Evaluate a model on a benchmark or on your own data.",
    examples=(
        ("internvl3 eval chartqa --data ChartQA_TEST.tsv --model 2b", "a benchmark"),
        ("internvl3 eval mmmu --data lmms-lab/MMMU --limit 200 --preset lmms", "a part of one"),
        ("internvl3 eval receipts.jsonl --metric anls --model 2b", "a file of your own"),
    ),
    suggestions={
        "-q": "--quiet", "--quantize": "--q-bits", "--output": "-o",
        "--adapter": "--adapter-path", "--max-new-tokens": "--max-tokens",
    },
)  # fmt: skip
@click.argument("task", required=False)
@flags(DATA_FLAGS, HOW_FLAGS)
@options.load_flags
@eval_best_flags
@flags(JUDGE_FLAG, RUN_FLAGS)
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def run_command(task: str | None, **given: Any) -> None:
    """Evaluate a model on a benchmark, or on a file of your own, and print its score.

    TASK is a benchmark (internvl3 eval list shows them) or a file of records with question, answer
    and image. Decoding is greedy. The score has a 95% interval, and the published score of the
    model stands beside it where there is one. Predictions are saved as they come: the same command
    continues an interrupted run.
    """
    from internvl3_mlx.evaluation.setup import EvalOptions, plan_evaluation

    if task is None:
        raise UserError("no task; name a benchmark (internvl3 eval list) or a file of your own")
    names = ("data", "split", "preset", "limit", "seed", "metric", "prompt")
    wanted = EvalOptions(
        task=task,
        cot=bool(given["cot"]),
        **{name: given[name] for name in (*names, "max_tiles", "max_tokens", "num_frames")},
    )
    with console.spinner("reading the data", quiet=given["quiet"]):
        plan = plan_evaluation(wanted)
    run_evaluation(plan, given)


@click.command(
    "list",
    cls=SectionedCommand,
    short_help="List the benchmarks and their settings.",
    examples=(
        ("internvl3 eval list", "the settings of the published tables"),
        ("internvl3 eval list --preset lmms --json", "those of lmms-eval, with the prompts"),
    ),
)
@HOW_FLAGS[0]
@options.JSON_FLAG
@options.debug_flag
def list_command(preset: str, as_json: bool) -> None:
    """List the benchmarks with the prompt, tiles, tokens and metric that a preset gives them."""
    from internvl3_mlx.evaluation.scoring import METRICS
    from internvl3_mlx.evaluation.tasks import TASKS

    rows = []
    for task in TASKS.values():
        how = task.settings_of(preset)
        rows.append({
            "task": task.name,
            "tiles": how.max_tiles,
            "tokens": how.max_tokens,
            "metric": METRICS[how.metric].words,
            "parser": how.parser,
            "judge": how.judge,
            "data": ", ".join((*task.tsv, task.hub)),
            **({"prompt": how.prompt} if as_json else {}),
        })  # fmt: skip
    if as_json:
        console.print_json(rows, indent=2)
    else:
        console.print_table({f"preset {preset}": rows})
        console.hint("internvl3 eval list --json shows the prompts, too")


class EvalGroup(click.Group):
    """``eval TASK`` runs an evaluation; a few names in place of the task are commands."""

    context_class = HelpContext
    NAMES = ("compare", "synthetic", "list")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in (*self.commands, *ctx.help_option_names):
            near = did_you_mean(first, self.NAMES, otherwise="")
            if near and not expand_user(first).exists():
                raise click.UsageError(f"no task or command {first!r}; {near}", ctx)
            args = [RUN, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        run_command.format_help(
            click.Context(run_command, info_name=ctx.info_name, parent=ctx.parent), formatter
        )
        rows = [(f"eval {name}", self.commands[name].get_short_help_str(80)) for name in self.NAMES]
        with formatter.section("More"):
            formatter.write_dl(rows)


eval_command = EvalGroup(
    "eval",
    commands={
        RUN: run_command,
        "list": list_command,
        "compare": compare_command,
        "synthetic": synthetic_command,
    },
    short_help="Evaluate a model on benchmarks or your own data.",
)
