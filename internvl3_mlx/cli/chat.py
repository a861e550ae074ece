"""``internvl3 chat``: talk about pictures. Parse, open, then line after line."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.chat_session import Session
from internvl3_mlx.cli.generate import UNTRAINED
from internvl3_mlx.cli.input_line import Dropped, kind_of, shown
from internvl3_mlx.cli.line_reader import open_reader
from internvl3_mlx.cli.options import SectionedCommand
from internvl3_mlx.cli.slash_commands import ALIASES, COMMANDS
from internvl3_mlx.cli.system_info import hear_kernels
from internvl3_mlx.cli.thumbnails import drawer
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx import VLM

TITLE, ADVICE = "internvl3 chat", "drop an image or type · /help · Ctrl-D leaves"
SUGGESTED = 3  # pictures to try
WIDTH = 66  # of the box, its corners not counted


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
@options.settings
@options.loading
@options.debug
def chat(
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
        settings["v2pe_delta"] = options.deltas(settings["v2pe_delta"])
    if options.STDIN in (*images, *more_images):
        raise UserError(
            "standard input holds the questions of a chat; name a file, or use generate"
        )
    dropped = [Dropped(name, kind_of(name) or "image") for name in (*images, *more_images)]
    check(dropped)
    vlm = load(loading, settings.get("draft"), quiet=quiet)
    lively = console.is_lively(sys.stderr) and sys.stdin is not None and sys.stdin.isatty()
    draw = drawer(os.environ, wanted=preview) if console.is_lively(sys.stdout) else None
    session = Session(vlm.conversation(**settings), draw, quiet)
    if lively and not quiet:
        first_screen(vlm)
    for item in dropped:
        session.attach(item)
    converse(session)


def check(dropped: list[Dropped]) -> None:
    """Refuse a file that is not there before a model loads."""
    from internvl3_mlx.images.fetch import locate

    for item in dropped:
        if item.source != "clipboard" and "://" not in item.source:
            locate(item.source)


def load(loading: dict[str, Any], draft: str | None, *, quiet: bool) -> "VLM":
    from internvl3_mlx import load as load_model

    hear_kernels(quiet=quiet)
    model = loading.get("model", "the model")
    with console.waiting(f"loading {model}", quiet=quiet) as notify:
        vlm = load_model(**loading, notify=notify)
        if draft is not None:
            vlm.companion(draft)  # now rather than after the first question
    if not vlm.trained and not quiet:
        console.note(UNTRAINED)
    return vlm


def converse(session: Session) -> None:
    """Take line after line until the user leaves or the pipe ends."""
    reader = open_reader([*(command.name for command in COMMANDS), *ALIASES])
    while not session.over:
        try:
            text = reader.read()
        except EOFError:
            break
        try:
            session.take(text)
        except KeyboardInterrupt:  # between answers: in a picture that opens slowly, say
            console.end_line()


def first_screen(vlm: "VLM") -> None:
    """Show what was loaded, and with the demo what one may try."""
    model = f"model  {described(vlm)}"
    memory = f"memory  {memory_words()}"
    gap = " " * max(2, WIDTH - 4 - len(model) - len(memory))
    inner = f"  {model}{gap}{memory}  "
    width = max(WIDTH, len(inner))
    console.hint(f"╭─ {TITLE} {'─' * (width - len(TITLE) - 3)}╮")
    console.hint(f"│{inner:<{width}}│")
    console.hint(f"╰─ {ADVICE} {'─' * (width - len(ADVICE) - 3)}╯")
    for path, question in samples(vlm)[:SUGGESTED]:
        console.hint(f"try  {shown(path)} {question}")


def described(vlm: "VLM") -> str:
    """Name the model with its bits and size: ``InternVL3-2B · 4-bit · 1.6 GB``."""
    from mlx.utils import tree_flatten

    tensors: Any = tree_flatten(vlm.model.parameters())
    nbytes = sum(value.nbytes for _, value in tensors)
    return f"{Path(vlm.name).name} · {bits_of(vlm)}-bit · {console.size(nbytes)}"


def bits_of(vlm: "VLM") -> int:
    """Read the bits of the language model, where most of the weights are."""
    layer = vlm.model.language_model.model.layers[0].mlp.down_proj
    return int(getattr(layer, "bits", 8 * layer.weight.dtype.size))


def memory_words() -> str:
    import mlx.core as mx

    from internvl3_mlx.device import gpu_bytes

    return f"{mx.get_active_memory() / 1e9:.1f} of {gpu_bytes() / 1e9:.0f} GB"


def samples(vlm: "VLM") -> list[tuple[str, str]]:
    """List the demo's pictures with a question each; none for other models."""
    from internvl3_mlx.loading.resolve import DEMO_FOLDER

    if vlm.loaded.folder != DEMO_FOLDER:
        return []
    folder = DEMO_FOLDER / "samples"
    table = json.loads((folder / "samples.json").read_text("utf-8"))
    return [(str(folder / entry["file"]), entry["question"]) for entry in table]
