"""``internvl3 generate --best-of N``: write candidates, choose the best, and show why."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, generation_fields, progress
from internvl3_mlx.cli.flags import Decorator, Function, flag
from internvl3_mlx.cli.load_model import load_vlm
from internvl3_mlx.cli.options import OutputOptions, gather, only_given
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.images.load import LoadedImage
    from internvl3_mlx.test_time_scaling.best_of import BestOfEvent, BestOfQuestion, BestOfResult
    from internvl3_mlx.test_time_scaling.critic import Critic, ResponseScore

MAX_CANDIDATES = 256
SECTION = "Best of N"


def critic_flags(section: str, purpose: str) -> Mapping[str, Decorator]:
    """Make the flags that choose a critic, under a heading of the help."""
    return {
        "critic": flag(
            section, "--critic", "critic", metavar="PATH|REPO",
            help=f"{purpose}: visualprm-8b, a repository, a folder or a trained adapter.",
        ),
        "critic_mode": flag(
            section, "--critic-mode", "critic_mode", type=click.Choice(("soft", "hard", "orm")),
            help="Mean of P(+) over the steps, generated replies, or the response as one step.",
            show_default="soft",
        ),
        "critic_bits": flag(
            section, "--critic-bits", "critic_bits", type=click.Choice(("4", "8", "16")),
            help="Bits of the critic's language model.", show_default="as stored",
            callback=lambda _ctx, _param, bits: bits and int(bits),
        ),
        "critic_system": flag(
            section, "--critic-system", "critic_system", metavar="TEXT",
            help="The critic's system prompt; prm for that of the published critic data.",
            show_default="the critic's own",
        ),
    }  # fmt: skip


CRITIC_FLAGS = critic_flags(SECTION, "Choose by this critic")
SELECT_FLAG = flag(
    SECTION, "--select", "method", type=click.Choice(("vote", "log-prob")),
    help="Without a critic: the majority of final answers, or the most likely text.",
    show_default="vote",
)  # fmt: skip
BEST_OF_FLAGS: Mapping[str, Decorator] = {
    "n": flag(
        SECTION, "--best-of", "n", metavar="N", type=click.IntRange(1, MAX_CANDIDATES),
        help="Write N candidates, the first greedily, and print the best.",
    ),
    **CRITIC_FLAGS,
    "method": SELECT_FLAG,
    "show_candidates": flag(
        SECTION, "--show-candidates", "show_candidates", is_flag=True, default=None,
        help="Print all candidates with their scores.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BestOfRequest:
    """The flags of best-of-N. method: None for the critic if there is one, else vote."""

    n: int = 8
    critic: str | None = None
    critic_mode: str = "soft"
    critic_bits: int | None = None
    critic_system: str | None = None
    method: str | None = None
    show_candidates: bool = False


def chat_best_flags(command: Function) -> Function:
    """Give ``command`` the flags of /best, collected in ``best_of_options``."""
    return gather(command, {**CRITIC_FLAGS, "method": SELECT_FLAG}, "best_of_options", only_given)


def eval_best_flags(command: Function) -> Function:
    """Give ``command`` the flags of best-of-N but for showing the candidates."""
    table = {name: made for name, made in BEST_OF_FLAGS.items() if name != "show_candidates"}
    return gather(command, table, "best_of_options", only_given)


def best_of_flags(command: Function) -> Function:
    """Give ``command`` the flags of best-of-N, collected in ``best_of_options``."""
    return gather(command, BEST_OF_FLAGS, "best_of_options", only_given)


def read_best_of(given: dict[str, Any], generation_options: dict[str, Any]) -> BestOfRequest | None:
    """Make the request of the flags, None without --best-of; adds its defaults to the options.

    Raises UserError for flags that would have no effect.
    """
    if "n" not in given:
        if given:
            name = next(iter(given)).replace("_", "-").replace("method", "select")
            raise UserError(f"--{name} needs --best-of N")
        return None
    request = BestOfRequest(**given)
    check_critic_flags(request)
    from internvl3_mlx.test_time_scaling.candidates import BEST_OF_DEFAULTS, candidate_configs

    for name, value in BEST_OF_DEFAULTS.items():
        generation_options.setdefault(name, value)
    candidate_configs(generation_fields.make_config(generation_options), request.n)
    return request


def check_critic_flags(request: BestOfRequest) -> None:
    """Raise UserError for flags that contradict each other or have no effect."""
    if request.critic is not None:
        if request.method is not None:
            raise UserError("--select is for best-of-N without a critic; drop it, or --critic")
        return
    default = BestOfRequest()
    for name in ("critic_mode", "critic_bits", "critic_system"):
        if getattr(request, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')} needs --critic")


def answer_best_of(
    request: BestOfRequest,
    question: str,
    images: "Sequence[LoadedImage]",
    generation_options: dict[str, Any],
    load_options: dict[str, Any],
    output: OutputOptions,
) -> None:
    """Write the candidates, choose the best and print it."""
    from internvl3_mlx.test_time_scaling.best_of import BestOfQuestion

    config = generation_fields.make_config(generation_options)
    asked = BestOfQuestion(question, images, config)
    events = start_best_of(request, asked, load_options, quiet=output.quiet)
    show_result(run_best_of(events, quiet=output.quiet), request, output)


def run_best_of(events: "Iterator[BestOfEvent]", *, quiet: bool) -> "BestOfResult":
    """Show the progress of all events and return the last one's result."""
    from internvl3_mlx.test_time_scaling.best_of import BestOfResult

    result: BestOfResult | None = None
    with closing(events), progress.progress_bar(quiet=quiet) as advance:  # type: ignore[type-var]
        for event in events:
            show_progress(event, advance)
            if isinstance(event, BestOfResult):
                result = event
    assert result is not None
    return result


def start_best_of(
    request: BestOfRequest, asked: "BestOfQuestion", load_options: dict[str, Any], *, quiet: bool
) -> "Iterator[BestOfEvent]":
    """Load the model and the critic, together or in turns, and return the events."""
    from internvl3_mlx.test_time_scaling.best_of import (
        BestOfConfig,
        best_of_events,
        best_of_in_turns,
        default_method,
    )

    method = request.method or default_method(request.critic is not None)
    config = BestOfConfig(n=request.n, method=method, critic_mode=request.critic_mode)
    load_policy = partial(load_vlm, load_options, quiet=quiet)
    if request.critic is None:
        return best_of_events(asked, config, load_policy().runner)
    load_judge = partial(load_critic, request, quiet=quiet)
    if take_turns(request, asked, load_options, quiet=quiet):
        return best_of_in_turns(asked, config, lambda: load_policy().runner, load_judge)
    return best_of_events(asked, config, load_policy().runner, load_judge())


def take_turns(
    request: BestOfRequest, asked: "BestOfQuestion", load_options: dict[str, Any], *, quiet: bool
) -> bool:
    """Tell whether the models take turns, by an estimate before either loads, and say so."""
    from internvl3_mlx.test_time_scaling.memory_plan import ModelChoice, plan_memory

    policy = ModelChoice(
        load_options.get("model"), load_options.get("quantize"), load_options.get("revision")
    )
    critic = ModelChoice(request.critic, request.critic_bits)
    with console.spinner("estimating memory", quiet=quiet) as notify:
        plan = plan_memory(policy, critic, request.n * asked.config.max_tokens, notify)
    if plan.in_turns and not quiet:
        console.note(plan.note)
    return plan.in_turns


def load_critic(request: BestOfRequest, *, quiet: bool) -> "Critic":
    """Load the critic under a spinner."""
    from internvl3_mlx import load_critic as load

    assert request.critic is not None
    with console.spinner(f"loading the critic {request.critic}", quiet=quiet) as notify:
        return load(
            request.critic,
            quantize=request.critic_bits,
            system=request.critic_system,
            notify=notify,
        )


def show_progress(event: "BestOfEvent", advance: progress.ProgressCallback) -> None:
    done = getattr(event, "done", None)
    if done is not None:
        task = "scoring candidates" if hasattr(event, "review") else "writing candidates"
        advance(task, done, event.total)  # type: ignore[union-attr]


def show_result(result: "BestOfResult", request: BestOfRequest, output: OutputOptions) -> None:
    """Print the best answer and how it was chosen; all candidates on request."""
    if output.as_json or output.as_jsonl:
        console.print_json(result.to_dict(), indent=2 if output.as_json else None)
        return
    if request.show_candidates:
        for index, candidate in enumerate(result.candidates):
            best = " · best" if index == result.index else ""
            console.write_heading(f"{index} · {format_score(candidate.score)}{best}")
            console.write_answer(candidate.answer.text + "\n")
            if candidate.review is not None and len(candidate.review.steps) > 1:
                write_steps(candidate.review)
    else:
        console.write_answer(result.answer.text + "\n")
    if not output.quiet:
        console.hint(describe_result(result))
    if output.stats:
        console.print_stats(result.answer)


def describe_result(result: "BestOfResult") -> str:
    """Say which candidate was chosen and how, such as ``best of 8: candidate 3 · critic 0.93``."""
    how = {"critic": f"{result.critic}, {result.mode}", "vote": "share of votes"}
    kind = how.get(result.method, "mean log-probability")
    parts = [f"best of {len(result.candidates)}: candidate {result.index}"]
    parts.append(f"{format_score(result.score)} ({kind})")
    if result.index:
        parts.append(f"greedy {format_score(result.candidates[0].score)}")
    return " · ".join(parts)


def format_score(score: float) -> str:
    return f"{score:.4g}"


def write_steps(review: "ResponseScore") -> None:
    """Write the steps of a response, each after its score and colored by it."""
    for step in review.steps:
        console.write_scored(step.text, step.score, step.reply)
