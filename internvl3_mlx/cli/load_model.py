"""Load a model under a spinner, with its notes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console
from internvl3_mlx.cli.system_info import report_kernel_fallbacks

if TYPE_CHECKING:
    from internvl3_mlx import VLM

UNTRAINED_NOTE = "this model has random weights; its answers are noise and only show that it runs"


def load_vlm(
    load_options: dict[str, Any], *, quiet: bool, prepare: "Callable[[VLM], None] | None" = None
) -> "VLM":
    """Load the model under a spinner; ``prepare`` runs under the spinner as well."""
    from internvl3_mlx import load

    report_kernel_fallbacks(quiet=quiet)
    model = load_options.get("model", "the model")
    with console.spinner(f"loading {model}", quiet=quiet) as notify:
        vlm = load(**load_options, notify=notify)
        if prepare is not None:
            prepare(vlm)
    if not vlm.trained and not quiet:
        console.note(UNTRAINED_NOTE)
    return vlm
