"""Run an evaluation on the terminal: progress, the table of results, and what to know about it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, progress
from internvl3_mlx.cli.best_of import BestOfRequest, check_critic_flags, load_critic
from internvl3_mlx.cli.flags import flag
from internvl3_mlx.cli.load_model import load_vlm
from internvl3_mlx.errors import UserError
from internvl3_mlx.records.json_values import pluralize

if TYPE_CHECKING:
    from internvl3_mlx.evaluation.results import EvalResult
    from internvl3_mlx.evaluation.runner import Evaluation
    from internvl3_mlx.evaluation.setup import EvalPlan
    from internvl3_mlx.test_time_scaling.best_of import BestOfConfig
    from internvl3_mlx.test_time_scaling.critic import Critic

SHOWN_ERRORS = 3
# of every command that runs an evaluation
RUN_FLAGS = (
    flag(
        "Speed", "--batch-size", "batch_size", metavar="N", type=click.IntRange(min=1), default=8,
        show_default=True, help="Number of answers generated in parallel.",
    ),
    flag(
        "Output", "-o", "--output-path", "output", metavar="FOLDER",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the predictions and results; an interrupted run continues there.",
    ),
    flag("Output", "--overwrite", "overwrite", is_flag=True, help="Start again in that folder."),
)  # fmt: skip


def run_evaluation(plan: "EvalPlan", given: dict[str, Any]) -> None:
    """Load the model, run the evaluation under a progress bar, and print its result."""
    from internvl3_mlx.evaluation.setup import make_evaluation

    quiet, as_json = given["quiet"], given["as_json"]
    vlm = load_vlm(given["load_options"], quiet=quiet)
    best_of, critic = read_best_of(given["best_of_options"], quiet=quiet)
    evaluation = make_evaluation(
        plan,
        vlm,
        folder=given["output"],
        adapter=given["load_options"].get("adapter"),
        judge=given["judge"],
        batch_size=given["batch_size"],
        overwrite=given["overwrite"],
        best_of=best_of,
        critic=critic,
    )
    try:
        result = follow(evaluation, quiet=quiet)
    except KeyboardInterrupt:
        if not quiet:
            console.note(f"stopped; the same command continues in {evaluation.folder}")
        raise
    if as_json:
        console.print_json(result.to_dict(), indent=2)
    else:
        show_result(result)
    if not quiet:
        console.hint(f"predictions, scores and settings are in {evaluation.folder}")


def read_best_of(
    given: dict[str, Any], *, quiet: bool
) -> "tuple[BestOfConfig | None, Critic | None]":
    """Return how the best of several candidates is chosen, with the critic loaded."""
    if "n" not in given:
        if given:
            raise UserError("--critic and --select need --best-of N")
        return None, None
    from internvl3_mlx.test_time_scaling.best_of import BestOfConfig, default_method

    request = BestOfRequest(**given)
    check_critic_flags(request)
    critic = None if request.critic is None else load_critic(request, quiet=quiet)
    method = request.method or default_method(critic is not None)
    return BestOfConfig(n=request.n, method=method, critic_mode=request.critic_mode), critic


def follow(evaluation: "Evaluation", *, quiet: bool) -> "EvalResult":
    """Run to the end; show progress, and name the first items that failed."""
    from internvl3_mlx.evaluation.runner import EvalEnd, EvalProgress, EvalStarted, ItemFailed

    failed = 0
    with progress.progress_bar(quiet=quiet) as advance:
        for event in evaluation.run():
            match event:
                case EvalStarted() if event.resumed and not quiet:
                    console.note(f"continuing after {event.resumed:,} of {event.items:,} items")
                case EvalProgress():
                    advance(event.stage, event.done, event.total)
                case ItemFailed():
                    failed += 1
                    if failed <= SHOWN_ERRORS and not quiet:
                        console.note(f"item {event.id} counts as wrong: {event.error}")
                case EvalEnd():
                    return event.result
                case _:
                    pass
    raise AssertionError("an evaluation ends with EvalEnd")


def show_result(result: "EvalResult") -> None:
    """Print the score with its interval, what it depends on, and what to know about it."""
    content = result.to_dict()
    console.print_table(result_table(content))
    for text in warnings(content):
        console.note(text)


def format_score(content: dict[str, Any]) -> str:
    """Format ``80.2 (78.1 – 82.1)``; the interval is 95%."""
    low, high = content["interval_95"]
    return f"{content['score']:.1f} ({low:.1f} – {high:.1f})"


def result_table(content: dict[str, Any]) -> dict[str, Any]:
    published = content["published"]
    changed = f", changed: {', '.join(content['changed'])}" if content["changed"] else ""
    note = f" ({published['note']})" if published and published.get("note") else ""
    judge = {"judge": content["judge"]} if content["judge"] else {}
    adapter = {"adapter": content["adapter"]} if content["adapter"] else {}
    best = content["best_of"]
    by = best and (f"{best['critic']} ({best['mode']})" if best["critic"] else best["method"])
    best_of = {"best of": f"{best['n']} by {by}"} if best else {}
    categories = [
        {"category": name, "n": part["n"], "score": format_score(part)}
        for name, part in content["categories"].items()
    ]
    rate = content["tokens_per_second"]
    preset = f"{content['harness']} (--preset {content['preset']}{changed})"
    harness = {"harness": preset} if content["harness"] else {}
    return {
        "task": content["title"],
        "score": format_score(content),
        "metric": f"{content['metric']}, 95% interval ({content['interval_method']})",
        "items": content["n"],
        "published": published and f"{published['model']} {published['score']:g}{note}",
        "model": f"{content['model']}, {content['weights']}",
        **adapter,
        **best_of,
        **harness,
        "prompt": content["prompt"],
        **({"reasoning": "asked for (--cot)"} if content["cot"] else {}),
        "tiles": content["max_tiles"] or "the model's own",
        "tokens": content["max_tokens"],
        "parser": content["parser"],
        **judge,
        "speed": rate and f"{rate:,.1f} tokens a second, peak {content['peak_memory_gb']:.2f} GB",
        **({"by category": categories} if categories else {}),
    }


def warnings(content: dict[str, Any]) -> Iterator[str]:
    """Say what of a result needs attention."""
    if count := content["errors"]:
        counts = "counts" if count == 1 else "count"
        yield (
            f"{pluralize(count, 'item')} could not be asked and {counts} as wrong; "
            "scores.jsonl says why"
        )
    if count := content["cut_answers"]:
        were = "was" if count == 1 else "were"
        yield f"{pluralize(count, 'answer')} {were} cut at {content['max_tokens']:,} tokens"
    if count := content["unread_answers"]:
        yield f"nothing was found that could be scored in {pluralize(count, 'answer')}"
    if content["published"] and content["changed"]:
        yield "settings were changed, so the published score was measured otherwise"
    if content["published"] and content["preset"] != "internvl":
        yield "the published score was measured with --preset internvl"
    if content["limit"]:
        yield f"only {content['n']:,} items were selected (seed {content['seed']})"
