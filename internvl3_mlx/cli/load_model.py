"""Load a model under a spinner, with its notes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console
from internvl3_mlx.cli.system_info import report_kernel_fallbacks

if TYPE_CHECKING:
    from internvl3_mlx import VLM

UNTRAINED_NOTE = "this model has random weights; its answers are noise and only show that it runs"
V2PE_NOTE = "models with {model} were trained without V2PE; --v2pe-delta may cost accuracy"


def load_vlm(
    load_options: dict[str, Any],
    *,
    quiet: bool,
    prepare: "Callable[[VLM], None] | None" = None,
    v2pe_delta: object = 1,
) -> "VLM":
    """Load the model under a spinner; ``prepare`` runs under the spinner as well.

    v2pe_delta: that of the questions to come, for a note where the model was trained without.
    """
    from internvl3_mlx import load
    from internvl3_mlx.config.decoders import FAMILIES

    report_kernel_fallbacks(quiet=quiet)
    model = load_options.get("model", "the model")
    with console.spinner(f"loading {model}", quiet=quiet) as notify:
        vlm = load(**load_options, notify=notify)
        if prepare is not None:
            prepare(vlm)
    if not vlm.trained and not quiet:
        console.note(UNTRAINED_NOTE)
    row = FAMILIES[vlm.config.text.family]
    if v2pe_delta != 1 and not row.v2pe and not quiet:
        console.note(V2PE_NOTE.format(model=row.title))
    return vlm
