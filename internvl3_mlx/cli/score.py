"""``internvl3 score``: what a critic thinks of one response, step by step."""

import sys
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, generation_fields, options
from internvl3_mlx.cli.best_of import (
    BestOfRequest,
    critic_flags,
    format_score,
    load_critic,
    write_steps,
)
from internvl3_mlx.cli.flags import SectionedCommand, apply_flags, flag
from internvl3_mlx.cli.input_line import expand_sample, media_source, open_media
from internvl3_mlx.cli.options import STDIN
from internvl3_mlx.errors import UserError
from internvl3_mlx.user_paths import expand_user

if TYPE_CHECKING:
    from internvl3_mlx.test_time_scaling.critic import ResponseScore

IMAGE_OPTIONS = ("max_tiles", "min_tiles", "thumbnail", "upright", "v2pe_delta")
CRITIC_FLAGS = critic_flags("Critic", "The critic")
LIMIT_BYTES = 4 * 2**20  # of a response


def image_flags(command: Any) -> Any:
    return apply_flags([options.GENERATION_FLAGS[name] for name in IMAGE_OPTIONS], command)


@click.command(
    cls=SectionedCommand,
    short_help="Let a critic judge a response step by step.",
    examples=(
        (
            'internvl3 score --critic visualprm-8b -i chart.png -p "How many?" --response a.txt',
            "a response in a file",
        ),
        (
            'internvl3 score --critic adapters -p "What is 2 + 2?" --response a.txt --json',
            "a critic of your own, for a script",
        ),
    ),
    suggestions={"-q": "--quiet", "--question": "--prompt"},
)
@flag("Question", "-p", "--prompt", "question", metavar="TEXT", help="The question.")
@flag(
    "Question", "--response", "response", metavar="FILE",
    help="The response to judge; - for standard input.",
)  # fmt: skip
@flag(
    "Images", "-i", "--image", "images", multiple=True, metavar="IMAGE",
    help="An image of the question; may be repeated.",
)  # fmt: skip
@flag(
    "Critic", "--max-steps", "max_steps", metavar="N", type=click.IntRange(min=1), default=16,
    help="Join steps if there are more.", show_default=True,
)  # fmt: skip
@image_flags
@lambda command: apply_flags(CRITIC_FLAGS.values(), command)
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def score_command(
    question: str | None,
    response: str | None,
    images: tuple[str, ...],
    max_steps: int,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Let a critic judge a response: P(+) of each step, separated by blank lines.

    A critic is any InternVL model that replies + or -: VisualPRM, or one that
    internvl3 train --method prm made.
    """
    if flags["critic"] is None:
        raise UserError("name the critic: --critic PATH|REPO, such as --critic visualprm-8b")
    if not question:
        raise UserError('name the question: -p "How many?"')
    text = read_response(response)
    critic_options = {name: flags.pop(name) for name in CRITIC_FLAGS}
    request = BestOfRequest(**options.only_given(critic_options))
    config = generation_fields.make_config(options.only_given(flags))
    media = map(media_source, map(expand_sample, images))
    opened = [image for one in media for image in open_media(one, upright=config.upright)]
    session = load_critic(request, quiet=quiet).open(question, opened, config)
    with console.spinner("judging the response", quiet=quiet):
        found = session.score(text, request.critic_mode, max_steps=max_steps)
    if as_json:
        console.print_json(score_values(found, request), indent=2)
        return
    write_steps(found)
    if not quiet:
        console.hint(f"{format_score(found.score)} · {describe_mode(found.mode)}")


def read_response(source: str | None) -> str:
    """Return the response in a file or on standard input. Raises UserError for an empty one."""
    if source is None:
        raise UserError("name the response to judge: --response FILE, or - for standard input")
    try:
        if source == STDIN:
            text = sys.stdin.read(LIMIT_BYTES + 1) if sys.stdin is not None else ""
        else:
            path = expand_user(source)
            if path.exists() and not path.is_file():
                raise UserError(f"{source} is not a regular file; name a text file")
            with path.open(encoding="utf-8") as file:
                text = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text; convert it") from error
    place = "on standard input" if source == STDIN else f"in {source}"
    if not text.strip():
        raise UserError(f"the response {place} is empty; there is nothing to judge")
    if len(text) > LIMIT_BYTES:
        raise UserError(f"the response {place} has more than {LIMIT_BYTES:,} characters")
    return text.strip()


def describe_mode(mode: str) -> str:
    modes = {"soft": "mean of P(+)", "hard": "sum of the replies", "orm": "P(+) of the whole"}
    return modes[mode]


def score_values(found: "ResponseScore", request: BestOfRequest) -> dict[str, Any]:
    """Return the JSON of a critic's view."""
    from internvl3_mlx.test_time_scaling.best_of import json_score, review_values

    return {
        "critic": request.critic,
        "critic_mode": found.mode,
        "score": json_score(found.score),
        "steps": review_values(found),
    }
