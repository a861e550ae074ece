"""``internvl3 chat``: a conversation about images in the terminal or through a pipe."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, generation_fields, options
from internvl3_mlx.cli.answer_each import SOME_FAILED
from internvl3_mlx.cli.best_of import BestOfRequest, chat_best_flags, check_critic_flags
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.cli.generate import IMAGE_FLAG, load_vlm
from internvl3_mlx.cli.input_line import SAMPLE_PREFIX, MediaSource, expand_sample, media_source
from internvl3_mlx.cli.line_reader import open_line_reader, without_echo
from internvl3_mlx.cli.past_chats import continue_past_chat, find_past_chat, new_log
from internvl3_mlx.cli.slash_commands import ALIASES, COMMANDS, handle_line
from internvl3_mlx.cli.thumbnails import choose_thumbnail_encoder
from internvl3_mlx.cli.user_config import find_alias
from internvl3_mlx.errors import UserError
from internvl3_mlx.json_files import read_json_value

if TYPE_CHECKING:
    from internvl3_mlx import VLM
    from internvl3_mlx.generation.conversation_log import LoggedConversation

BANNER_TITLE, BANNER_HINT = "internvl3 chat", "drop an image or type · /help · Ctrl-D leaves"
MAX_SUGGESTIONS = 3
BANNER_WIDTH = 66  # without its corners


@click.command(
    cls=SectionedCommand,
    short_help="Chat about images, videos and PDFs.",
    examples=(
        ("internvl3 chat", "start with the default model"),
        ("internvl3 chat report.pdf --model 8b", "attach a PDF to the first question"),
        ("internvl3 chat --continue", "the last conversation again"),
    ),
    suggestions={
        "-q": "--quiet",
        "--quantize": "--q-bits",
        "-p": "generate -p",
        "--best-of": "/best N in the chat",
    },
)
@click.argument("images", nargs=-1)
@IMAGE_FLAG
@flag(
    "Images", "--preview/--no-preview", "preview", default=None,
    help="Display attached images in the terminal; by default where this is known to work.",
)  # fmt: skip
@flag(
    "Run",
    "--continue",
    "continue_last",
    is_flag=True,
    help="Continue the last conversation, with its model.",
)
@flag(
    "Run",
    "--conversation",
    "resume",
    metavar="N",
    type=click.IntRange(min=1),
    help="Continue conversation N of internvl3 history.",
)
@flag(
    "Run",
    "--history/--no-history",
    "history",
    default=True,
    envvar="INTERNVL3_HISTORY",
    help="Keep the conversation and the typed lines, readable by you alone.",
    show_default="on",
)
@flag(
    "Run",
    "--keep-images",
    "keep_images",
    is_flag=True,
    help="Copy images into the history; by default it names their paths.",
)
@flag("Output", "--quiet", "quiet", is_flag=True, help="No notes and no statistics.")
@options.generation_flags
@chat_best_flags
@options.load_flags
@options.debug_flag
def chat_command(
    images: tuple[str, ...],
    more_images: tuple[str, ...],
    preview: bool | None,
    quiet: bool,
    generation_options: dict[str, Any],
    load_options: dict[str, Any],
    best_of_options: dict[str, Any],
    **history: Any,
) -> None:
    """Chat about images, videos and PDF pages.

    IMAGES are attached to the first question: files, http(s) addresses or clipboard. Without a
    terminal, every line of standard input is a question, and only the answers are written.
    """
    sources = tuple(map(expand_sample, (*images, *more_images)))
    if options.STDIN in sources:
        raise UserError(
            "a chat reads its questions from standard input; name a file, or use generate"
        )
    media = [media_source(name) for name in sources]
    check_sources_exist(media)
    # an invalid option is reported before a model loads
    generation_fields.make_config(generation_options)
    best_of = BestOfRequest(**best_of_options)
    check_critic_flags(best_of)
    past = find_past(history)
    if past is not None and not is_given("model"):
        given = {name: value for name, value in load_options.items() if is_given(name)}
        load_options = {**given, **past.start.get("load", {})}
    vlm = load_chat_model(load_options, generation_options, quiet=quiet)
    encoder = choose_thumbnail_encoder(os.environ, wanted=preview)
    session = ChatSession(
        vlm.conversation(**generation_options),
        encoder if console.is_interactive(sys.stdout) else None,
        quiet,
        debug=bool(click.get_current_context().meta.get(options.DEBUG_KEY)),
        load_model=partial(load_other_model, load_options, quiet=quiet),
        best_of=best_of,
    )
    session.conversation.configure()  # reports what this model cannot follow
    if history["history"]:
        session.log = new_log(
            session.conversation, load_options, keep_images=history["keep_images"]
        )
    keyboard = sys.stdin is not None and sys.stdin.isatty()
    if console.is_interactive(sys.stderr) and keyboard and not quiet:
        show_banner(vlm)
    try:
        if past is not None:
            continue_past_chat(session, past)
        session.attach(media)
        run_chat(session, keep_lines=history["history"])
    finally:
        session.close_log()
    if session.num_failed and not keyboard:
        raise SystemExit(SOME_FAILED)  # a script must learn that a question was not answered


def is_given(name: str) -> bool:
    """Return whether a flag was given, not taken from the environment or the user's file."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def find_past(history: dict[str, Any]) -> "LoggedConversation | None":
    if history["continue_last"]:
        return find_past_chat(1)
    return find_past_chat(history["resume"]) if history["resume"] else None


def load_other_model(load_options: dict[str, Any], name: str, *, quiet: bool) -> "VLM":
    """Load the model for /model; revision and adapter belong to the one before."""
    kept = {key: value for key, value in load_options.items() if key == "quantize"}
    alias = find_alias(name)
    named: dict[str, Any] = {key: alias[key] for key in ("model", "adapter") if key in alias}
    return load_vlm({**kept, **named}, quiet=quiet)


def check_sources_exist(media: list[MediaSource]) -> None:
    """Raise ImageError for a file that does not exist, before a model loads."""
    from internvl3_mlx.images.fetch import locate

    for item in media:
        if item.source != "clipboard" and "://" not in item.source:
            locate(item.source)


def load_chat_model(
    load_options: dict[str, Any], generation_options: dict[str, Any], *, quiet: bool
) -> "VLM":
    """Load the model, and its draft model now rather than at the first question."""
    draft = generation_options.get("draft_model")

    def load_draft(vlm: "VLM") -> None:
        if draft is not None:
            vlm.load_draft_model(draft)

    delta = generation_options.get("v2pe_delta", 1)
    return load_vlm(load_options, quiet=quiet, prepare=load_draft, v2pe_delta=delta)


def run_chat(session: ChatSession, *, keep_lines: bool = False) -> None:
    """Handle line after line until the user leaves or the pipe ends."""
    names = [*(command.name for command in COMMANDS), *ALIASES]
    reader = open_line_reader(names, keep_lines=keep_lines)
    for number in (signal.SIGHUP, signal.SIGTERM):  # a closed window: what was said is kept
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    while not session.is_finished:
        try:
            text = reader.read()
        except EOFError:
            break
        except UserError as error:
            session.num_failed += 1
            console.error(str(error))
            continue
        try:
            with without_echo():
                handle_line(session, text)
        except KeyboardInterrupt:  # outside of an answer: while a large image opens, for example
            console.end_line()


def show_banner(vlm: "VLM") -> None:
    """Show which model was loaded, and for the demo some questions to try."""
    model = f"model  {describe_model(vlm)}"
    memory = f"memory  {format_memory_use()}"
    gap = " " * max(2, BANNER_WIDTH - 4 - len(model) - len(memory))
    inner = f"  {model}{gap}{memory}  "
    width = max(BANNER_WIDTH, len(inner))
    samples = demo_samples(vlm)[:MAX_SUGGESTIONS]
    if width + 2 > shutil.get_terminal_size().columns:  # no box: it would break
        for line in (model, memory, BANNER_HINT, *map(suggest_sample, samples)):
            console.hint(line)
        return
    console.hint(f"╭─ {BANNER_TITLE} {'─' * (width - len(BANNER_TITLE) - 3)}╮")
    console.hint(f"│{inner:<{width}}│")
    console.hint(f"╰─ {BANNER_HINT} {'─' * (width - len(BANNER_HINT) - 3)}╯")
    for sample in samples:
        console.hint(suggest_sample(sample))


def suggest_sample(sample: tuple[str, str]) -> str:
    return f"try  {' '.join(sample)}"


def describe_model(vlm: "VLM") -> str:
    """Return name, bits and size of a model, such as ``InternVL3-2B · 4-bit · 1.6 GB``."""
    from mlx.utils import tree_flatten

    tensors: Any = tree_flatten(vlm.model.parameters())
    nbytes = sum(value.nbytes for _, value in tensors)
    bits = language_model_bits(vlm)
    return f"{Path(vlm.name).name} · {bits}-bit · {console.format_size(nbytes)}"


def language_model_bits(vlm: "VLM") -> int:
    """Return the bits of the language model, where most of the weights are."""
    layer = vlm.model.language_model.model.layers[0].mlp.down_proj
    return int(getattr(layer, "bits", 8 * layer.weight.dtype.size))


def format_memory_use() -> str:
    import mlx.core as mx

    from internvl3_mlx.device import gpu_memory_limit

    used, limit = mx.get_active_memory() / console.GB, gpu_memory_limit() / console.GB
    return f"{used:.1f} of {limit:.0f} GB"


def demo_samples(vlm: "VLM") -> list[tuple[str, str]]:
    """Return short names of the demo's sample images, each with a question; none for others."""
    from internvl3_mlx.loading.resolve import DEMO_FOLDER

    if vlm.loaded.folder != DEMO_FOLDER:
        return []
    table = read_json_value(DEMO_FOLDER / "samples" / "samples.json")
    return [(SAMPLE_PREFIX + entry["file"], entry["question"]) for entry in table]
