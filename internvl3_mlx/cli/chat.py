"""``internvl3 chat``: talk about pictures. Parse, open, then line after line."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.generate import UNTRAINED_NOTE
from internvl3_mlx.cli.input_line import MediaSource, display_path, media_kind
from internvl3_mlx.cli.line_reader import open_line_reader
from internvl3_mlx.cli.options import SectionedCommand
from internvl3_mlx.cli.slash_commands import ALIASES, COMMANDS
from internvl3_mlx.cli.system_info import report_kernel_fallbacks
from internvl3_mlx.cli.thumbnails import choose_thumbnail_encoder
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx import VLM

BANNER_TITLE, BANNER_HINT = "internvl3 chat", "drop an image or type · /help · Ctrl-D leaves"
MAX_SUGGESTIONS = 3  # pictures to try
BANNER_WIDTH = 66  # of the box, its corners not counted


@click.command(cls=SectionedCommand, short_help="Talk about pictures.")
@click.argument("images", nargs=-1)
@options.flag(
    "Pictures", "-i", "--image", "more_images", multiple=True, metavar="IMAGE",
    help="A picture, like IMAGES; may be repeated.",
)  # fmt: skip
@options.flag(
    "Pictures", "--preview/--no-preview", "preview", default=None,
    help="Show attached pictures in the terminal; by default where it is known to work.",
)  # fmt: skip
@options.flag("Output", "-q", "--quiet", "quiet", is_flag=True, help="No notes, no figures.")
@options.generation_flags
@options.load_flags
@options.debug_flag
def chat_command(
    images: tuple[str, ...],
    more_images: tuple[str, ...],
    preview: bool | None,
    quiet: bool,
    settings: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Talk about pictures, videos and PDF pages.

    IMAGES are attached to the first question: files, http(s) addresses or clipboard. Without a
    terminal every line of standard input is a question, and only the answers are written.
    """
    if "v2pe_delta" in settings:
        settings["v2pe_delta"] = options.parse_deltas(settings["v2pe_delta"])
    if options.STDIN in (*images, *more_images):
        raise UserError(
            "standard input holds the questions of a chat; name a file, or use generate"
        )
    dropped = [MediaSource(name, media_kind(name) or "image") for name in (*images, *more_images)]
    check_sources_exist(dropped)
    vlm = load_chat_model(loading, settings.get("draft_model"), quiet=quiet)
    lively = console.is_interactive(sys.stderr) and sys.stdin is not None and sys.stdin.isatty()
    draw = (
        choose_thumbnail_encoder(os.environ, wanted=preview)
        if console.is_interactive(sys.stdout)
        else None
    )
    session = ChatSession(vlm.conversation(**settings), draw, quiet)
    if lively and not quiet:
        show_banner(vlm)
    for item in dropped:
        session.attach(item)
    run_chat(session)


def check_sources_exist(dropped: list[MediaSource]) -> None:
    """Refuse a file that is not there before a model loads."""
    from internvl3_mlx.images.fetch import locate

    for item in dropped:
        if item.source != "clipboard" and "://" not in item.source:
            locate(item.source)


def load_chat_model(loading: dict[str, Any], draft: str | None, *, quiet: bool) -> "VLM":
    from internvl3_mlx import load as load_model

    report_kernel_fallbacks(quiet=quiet)
    model = loading.get("model", "the model")
    with console.spinner(f"loading {model}", quiet=quiet) as notify:
        vlm = load_model(**loading, notify=notify)
        if draft is not None:
            vlm.load_draft_model(draft)  # now rather than after the first question
    if not vlm.trained and not quiet:
        console.note(UNTRAINED_NOTE)
    return vlm


def run_chat(session: ChatSession) -> None:
    """Take line after line until the user leaves or the pipe ends."""
    reader = open_line_reader([*(command.name for command in COMMANDS), *ALIASES])
    while not session.is_finished:
        try:
            text = reader.read()
        except EOFError:
            break
        try:
            session.handle_line(text)
        except KeyboardInterrupt:  # between answers: in a picture that opens slowly, say
            console.end_line()


def show_banner(vlm: "VLM") -> None:
    """Show what was loaded, and with the demo what one may try."""
    model = f"model  {describe_model(vlm)}"
    memory = f"memory  {format_memory_use()}"
    gap = " " * max(2, BANNER_WIDTH - 4 - len(model) - len(memory))
    inner = f"  {model}{gap}{memory}  "
    width = max(BANNER_WIDTH, len(inner))
    console.hint(f"╭─ {BANNER_TITLE} {'─' * (width - len(BANNER_TITLE) - 3)}╮")
    console.hint(f"│{inner:<{width}}│")
    console.hint(f"╰─ {BANNER_HINT} {'─' * (width - len(BANNER_HINT) - 3)}╯")
    for path, question in demo_samples(vlm)[:MAX_SUGGESTIONS]:
        console.hint(f"try  {display_path(path)} {question}")


def describe_model(vlm: "VLM") -> str:
    """Name the model with its bits and size: ``InternVL3-2B · 4-bit · 1.6 GB``."""
    from mlx.utils import tree_flatten

    tensors: Any = tree_flatten(vlm.model.parameters())
    nbytes = sum(value.nbytes for _, value in tensors)
    return f"{Path(vlm.name).name} · {language_model_bits(vlm)}-bit · {console.format_size(nbytes)}"


def language_model_bits(vlm: "VLM") -> int:
    """Read the bits of the language model, where most of the weights are."""
    layer = vlm.model.language_model.model.layers[0].mlp.down_proj
    return int(getattr(layer, "bits", 8 * layer.weight.dtype.size))


def format_memory_use() -> str:
    import mlx.core as mx

    from internvl3_mlx.device import gpu_memory_limit

    return f"{mx.get_active_memory() / 1e9:.1f} of {gpu_memory_limit() / 1e9:.0f} GB"


def demo_samples(vlm: "VLM") -> list[tuple[str, str]]:
    """List the demo's pictures with a question each; none for other models."""
    from internvl3_mlx.loading.resolve import DEMO_FOLDER

    if vlm.loaded.folder != DEMO_FOLDER:
        return []
    folder = DEMO_FOLDER / "samples"
    table = json.loads((folder / "samples.json").read_text("utf-8"))
    return [(str(folder / entry["file"]), entry["question"]) for entry in table]
