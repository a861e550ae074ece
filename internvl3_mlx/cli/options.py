"""Flags that commands share, each written once.

A flag that is not given leaves no trace: its default lives with the code that uses it. The help
names those defaults too, and a test compares the two.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from internvl3_mlx.errors import UserError

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]
DEBUG_KEY = "internvl3_mlx.debug"  # the key under which --debug is kept while a command runs
MAX_SEED = 2**63 - 1
OTHER_SECTION = "Other"
SECTIONS = (
    "Question", "Pictures", "Answer", "Model", "Data", "Training", "Weights", "Preference", "Run",
    "Quantization", "Quality", "Upload", "Output", "Speed", "Memory", "Positions", OTHER_SECTION,
)  # fmt: skip
STDIN = "-"  # as a picture or as the question: read standard input


class SectionedOption(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Show defaults bare, and leave ranges to the message that a value outside them gets."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if "default" in extra:
            extra["default"] = extra["default"].strip("()")
        return extra


class SectionedCommand(click.Command):
    """A command whose help sorts the options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[getattr(param, "section", OTHER_SECTION)].append(record)
        for title in filter(sections.get, SECTIONS):
            with formatter.section(title):
                formatter.write_dl(sections[title])


@dataclass(frozen=True)
class OutputOptions:
    """How the answer is shown."""

    as_json: bool
    as_jsonl: bool
    each: bool
    quiet: bool
    stats: bool


def flag(section: str, *names: str, **kwargs: Any) -> Decorator:
    """Declare one option under a heading of the help."""
    return click.option(*names, cls=SectionedOption, section=section, **kwargs)


def _remember_debug(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    ctx.meta[DEBUG_KEY] = wanted


# Eager: a mistake in any other flag is then told with its traceback as well.
debug_flag = flag(
    "Output", "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug,
    help="Show the whole traceback when something fails.",
)  # fmt: skip

_POSITIVE, _COUNT, _SHARE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(0, 1)


def complete_models(ctx: click.Context, param: click.Parameter, typed: str) -> Any:

    return list_model_completions(ctx, param, typed)


LOAD_FLAGS: Mapping[str, Decorator] = {
    "model": flag(
        "Model", "--model", "model", metavar="PATH|REPO|SIZE", envvar="INTERNVL3_MODEL",
        show_envvar=True, help="A folder, a hub repository, a size such as 2b, or demo.",
        shell_complete=complete_models,
    ),
    "revision": flag(
        "Model", "--revision", "revision", metavar="NAME", help="Branch, tag or commit on the hub.",
    ),
    "quantize": flag(
        "Model", "--q-bits", "--quantize", "quantize", type=click.Choice(["4", "8", "16"]),
        callback=lambda _ctx, _param, bits: bits and int(bits),
        help="Bits of the language model. Sizes come with 4, other models as they are stored.",
    ),
    "adapter": flag(
        "Model", "--adapter-path", "adapter", metavar="FOLDER",
        help="A LoRA or DoRA adapter, as train and PEFT write it.",
    ),
}  # fmt: skip


def read_schema(_ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    """Read the file now: a mistake in its name must not cost loading a model."""
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text("utf-8")
        json.loads(text)
    except OSError as error:
        raise UserError(f"no schema at {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; correct it") from error
    return text


GENERATION_FLAGS: Mapping[str, Decorator] = {
    "system": flag(
        "Question", "--system", "--system-prompt", "system", metavar="TEXT",
        show_default="the model's own", help='System text; "" for none.',
    ),
    "max_tokens": flag(
        "Answer", "-m", "--max-tokens", "max_tokens", metavar="N", type=_POSITIVE,
        show_default="1024", help="Longest answer, in tokens.",
    ),
    "temperature": flag(
        "Answer", "--temp", "--temperature", "temperature", metavar="X",
        type=click.FloatRange(min=0), show_default="0.0", help="0 always takes the likeliest.",
    ),
    "top_p": flag(
        "Answer", "--top-p", "top_p", metavar="X", type=click.FloatRange(0, 1, min_open=True),
        show_default="1.0", help="Sample from the likeliest tokens that share this probability.",
    ),
    "top_k": flag(
        "Answer", "--top-k", "top_k", metavar="N", type=_COUNT, show_default="0",
        help="Sample from this many tokens; 0 for all.",
    ),
    "min_p": flag(
        "Answer", "--min-p", "min_p", metavar="X", type=_SHARE, show_default="0.0",
        help="Leave out tokens less likely than this share of the likeliest.",
    ),
    "repetition_penalty": flag(
        "Answer", "--repetition-penalty", "repetition_penalty", metavar="X",
        type=click.FloatRange(min=0, min_open=True), help="Above 1 discourages repeating.",
    ),
    "seed": flag(
        "Answer", "--seed", "seed", metavar="N", type=click.IntRange(0, MAX_SEED),
        help="The same seed gives the same sample.",
    ),
    "stop": flag(
        "Answer", "--stop", "stop", multiple=True, metavar="TEXT",
        help="End the answer before this text; may be repeated.",
    ),
    "keep_boxes": flag(
        "Answer", "--keep-boxes", "keep_boxes", flag_value=True, default=None, type=bool,
        help="Keep the <box> and <ref> marks of grounding answers.",
    ),
    "num_frames": flag(
        "Pictures", "--num-frames", "num_frames", metavar="N", type=_POSITIVE, show_default="8",
        help="Frames taken from each video.",
    ),
    "frame_times": flag(
        "Pictures", "--frame-times", "frame_times", flag_value=True, default=None, type=bool,
        help="Tell the model the second of each frame.",
    ),
    "max_tiles": flag(
        "Pictures", "--max-tiles", "max_tiles", metavar="N", type=_POSITIVE,
        show_default="the model's own",
        help="Most tiles a picture is cut into: detail against time.",
    ),
    "min_tiles": flag(
        "Pictures", "--min-tiles", "min_tiles", metavar="N", type=_POSITIVE,
        show_default="the model's own",
        help="Fewest tiles a picture is cut into.",
    ),
    "thumbnail": flag(
        "Pictures", "--no-thumbnail", "thumbnail", flag_value=False, default=None, type=bool,
        help="Leave out the small view of the whole picture.",
    ),
    "upright": flag(
        "Pictures", "--no-exif", "upright", flag_value=False, default=None, type=bool,
        help="Do not turn photographs upright.",
    ),
    "v2pe_delta": flag(
        "Positions", "--v2pe-delta", "v2pe_delta", metavar="STEP", show_default="1",
        help="Position step of an image token: 1, 1/2 ... 1/256 or auto; with commas, per image.",
    ),
    "ntk": flag(
        "Positions", "--no-ntk", "ntk", flag_value=False, default=None, type=bool,
        help="Do not stretch the rotary base past the trained length.",
    ),
    "json_schema": flag(
        "Answer", "--json-schema", "json_schema", metavar="FILE", callback=read_schema,
        help="Answer with JSON that fits the schema in this file.",
    ),
    "regex": flag(
        "Answer", "--regex", "regex", metavar="PATTERN",
        help="Answer with text that matches a regular expression.",
    ),
    "choice": flag(
        "Answer", "--choice", "choice", metavar="A,B,C",
        callback=lambda _ctx, _param, text: text and tuple(text.split(",")),
        help="Answer with one of these.",
    ),
    "lookup": flag(
        "Speed", "--lookup", "lookup", flag_value=True, default=None, type=bool,
        help="Guess ahead what followed the same words before; the answer stays the same.",
    ),
    "draft_model": flag(
        "Speed", "--draft-model", "draft_model", metavar="PATH|REPO|SIZE",
        shell_complete=complete_models,
        help="Let a smaller model of the family guess ahead; the answer stays the same.",
    ),
    "num_draft_tokens": flag(
        "Speed", "--num-draft-tokens", "num_draft_tokens", metavar="N", type=_POSITIVE,
        show_default="4", help="Tokens guessed at once.",
    ),
    "kv_bits": flag(
        "Memory", "--kv-bits", "kv_bits", type=click.Choice(["4", "8"]),
        callback=lambda _ctx, _param, bits: bits and int(bits), help="Quantize the cache.",
    ),
    "kv_group_size": flag(
        "Memory", "--kv-group-size", "kv_group_size", type=click.Choice(["32", "64", "128"]),
        callback=lambda _ctx, _param, size: size and int(size), show_default="64",
        help="Values that share a scale.",
    ),
    "quantized_kv_start": flag(
        "Memory", "--quantized-kv-start", "quantized_kv_start", metavar="N", type=_COUNT,
        show_default="0", help="Quantize the cache from this many tokens on.",
    ),
    "prefill_step_size": flag(
        "Memory", "--prefill-step-size", "prefill_step_size", metavar="N", type=_POSITIVE,
        show_default="what suits the device", help="Prompt tokens read at once.",
    ),
}  # fmt: skip

OUTPUT_FLAGS: Mapping[str, Decorator] = {
    "as_json": flag("Output", "--json", "as_json", is_flag=True, help="One JSON object."),
    "as_jsonl": flag("Output", "--jsonl", "as_jsonl", is_flag=True, help="One JSON line each."),
    "each": flag("Output", "--each", "each", is_flag=True, help="Ask about one picture at a time."),
    "quiet": flag("Output", "-q", "--quiet", "quiet", is_flag=True, help="No notes, no progress."),
    "stats": flag("Output", "--stats", "stats", is_flag=True, help="Tokens, speed and memory."),
}  # fmt: skip


def load_flags(command: Function) -> Function:
    """Give ``command`` the flags of ``load`` as one dictionary ``loading`` of those given."""
    return _gather(command, LOAD_FLAGS, "loading", _only_given)


def generation_flags(command: Function) -> Function:
    """Give ``command`` the flags of ``Settings`` as one dictionary ``settings`` of those given."""
    return _gather(command, GENERATION_FLAGS, "settings", _only_given)


def output_flags(command: Function) -> Function:
    """Give ``command`` the output flags as one ``Output``."""
    return _gather(command, OUTPUT_FLAGS, "output", lambda values: OutputOptions(**values))


def parse_deltas(text: str) -> "float | Fraction | str | tuple[Any, ...]":
    """Read ``--v2pe-delta``: one step for all images, or with commas one for each."""
    from internvl3_mlx.prompt.v2pe import parse_delta

    steps = tuple(parse_delta(part.strip()) for part in text.split(","))
    if len(steps) > 1 and "auto" in steps:
        raise UserError(f"--v2pe-delta {text}: auto stands alone; give a step for each image")
    return steps[0] if len(steps) == 1 else steps


def _gather(
    command: Function,
    table: Mapping[str, Decorator],
    name: str,
    join: Callable[[dict[str, Any]], object],
) -> Function:
    @wraps(command)
    def gathered(**values: Any) -> object:
        taken = {field: values.pop(field) for field in table}
        return command(**values, **{name: join(taken)})

    decorated: Function = gathered
    for declare in reversed([*table.values()]):
        decorated = declare(decorated)
    return decorated


def _only_given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != ()}


FAMILY = "internvl3"


def list_model_completions(
    _ctx: click.Context, _param: click.Parameter, typed: str
) -> list[CompletionItem]:
    """Complete ``--model``: sizes, the demo, the family's repositories in the cache, folders."""
    from internvl3_mlx.loading.resolve import DEMO, PUBLISHED_SIZES

    names = [*PUBLISHED_SIZES, DEMO, *cached_repositories()]
    found = [CompletionItem(name) for name in names if name.startswith(typed)]
    return [*found, CompletionItem(typed, type="dir")]


def cached_repositories() -> list[str]:
    """List the family's repositories in the hub's cache by the names of their folders."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    return sorted(name for name in names if FAMILY in name.lower())
