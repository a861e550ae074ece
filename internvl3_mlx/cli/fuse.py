"""``internvl3 fuse``: an adapter becomes part of its model's weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.cli import options
from internvl3_mlx.cli.convert import checkpoint_flags
from internvl3_mlx.cli.convert_run import (
    CheckpointRequest,
    check_upload_repo,
    run_convert,
    show_convert_report,
)
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FuseRequest(CheckpointRequest):
    """The command line, as one value."""

    adapter: str
    adapter_only: bool

    def keywords(self) -> dict[str, Any]:
        return {**super().keywords(), "adapter": self.adapter}


@click.command(
    cls=SectionedCommand,
    short_help="Merge an adapter into its model.",
    examples=(
        ("internvl3 fuse --model 2b --adapter-path adapters -o merged", "a plain model"),
        (
            "internvl3 fuse --model 2b --adapter-path adapters --adapter-only --to hf -o hf",
            "the adapter itself, for transformers",
        ),
    ),
    suggestions={},
)
@flag("Model", "--model", "source", metavar="PATH|REPO|SIZE", help="What the adapter was made for.")
@flag("Model", "--adapter-path", "adapter", metavar="FOLDER", help="The adapter, in PEFT's form.")
@flag(
    "Model",
    "--save-path",
    "--mlx-path",
    "-o",
    "target",
    metavar="FOLDER",
    help="Where the result goes.",
)
@checkpoint_flags
@flag(
    "Model",
    "--adapter-only",
    "adapter_only",
    is_flag=True,
    help="Write the adapter itself, named for the layout of --to, and merge nothing.",
)
@flag("Model", "-d", "--dequantize", "dequantize", is_flag=True, help="Unpack a packed model.")
@flag(
    "Quality",
    "--proof/--no-proof",
    "verify",
    default=True,
    help="Ask result and adapter one question before the result is kept.",
)
@options.debug_flag
def fuse_command(source: str | None, adapter: str | None, **flags: Any) -> None:
    """Merge a LoRA or DoRA adapter into the model it was trained on.

    What comes out is a plain model. Packed weights that the adapter changes are packed again as
    they were, or left dense with --dequantize. Weights stream, so memory stays small.
    """
    if source is None:
        raise UserError("name the model that the adapter was made for: --model PATH|REPO|SIZE")
    if adapter is None:
        raise UserError("name the adapter to fuse: --adapter-path FOLDER")
    if flags["target"] is None:
        raise UserError("name the folder for the result: --save-path FOLDER")
    request = FuseRequest(source=source, adapter=adapter, **flags)
    check_fuse_request(request)
    if request.adapter_only:
        export_adapter(request)
    else:
        run_convert(request)


def check_fuse_request(request: FuseRequest) -> None:
    check_upload_repo(request)
    unused = request.dequantize or request.dtype is not None or request.upload_repo is not None
    if request.adapter_only and unused:
        raise UserError(
            "--adapter-only writes an adapter; leave out --dequantize, --dtype and --upload-repo"
        )


def export_adapter(request: FuseRequest) -> None:
    """Write the adapter under the names of another layout's model."""
    from internvl3_mlx.adapters.peft_writer import convert_adapter_layout
    from internvl3_mlx.conversion import find_source

    folder, target = Path(request.adapter).expanduser(), Path(request.target or "").expanduser()
    source = find_source(request.source, request.revision)
    modules = convert_adapter_layout(
        folder, target, source, request.to, overwrite=request.overwrite
    )
    report = {"adapter": str(folder), "target": str(target), "layout": request.to}
    show_convert_report(request, {**report, "modules": len(modules)})
