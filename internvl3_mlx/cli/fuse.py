"""``internvl3 fuse``: merges an adapter into its model."""

from dataclasses import dataclass
from typing import Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.convert_run import (
    CheckpointRequest,
    check_upload_repo,
    run_convert,
    show_convert_report,
)
from internvl3_mlx.cli.flags import SectionedCommand, flags_from
from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import config_field
from internvl3_mlx.user_paths import expand_user


@dataclass(frozen=True, kw_only=True)
class FuseRequest(CheckpointRequest):
    """The options of ``internvl3 fuse``."""

    target: str | None = config_field(
        None, "Model", "Folder for the result.", metavar="FOLDER", flags=("-o", "--save-path")
    )
    adapter: str
    adapter_only: bool = config_field(
        False,
        "Model",
        "Write the adapter itself with the names of --to; merge nothing.",
        flags=("--adapter-only",),
    )

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
    suggestions={
        "--mlx-path": "--save-path",
        "--proof": "--verify",
        "--no-proof": "--no-verify",
    },
)
@options.LOAD_FLAGS["model"]
@options.LOAD_FLAGS["adapter"]
@flags_from(FuseRequest)
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def fuse_command(model: str | None, adapter: str | None, **flags: Any) -> None:
    """Merge a LoRA or DoRA adapter into the model it was trained on.

    The result is a plain model. Quantized weights that the adapter changes are quantized again with
    the same settings, or left unquantized with --dequantize. Weights are streamed, so memory use
    stays small.
    """
    if model is None:
        raise UserError("name the model that the adapter was made for: --model PATH|REPO|SIZE")
    if adapter is None:
        raise UserError("name the adapter to fuse: --adapter-path PATH|REPO")
    if flags["target"] is None:
        raise UserError("name the folder for the result: --save-path FOLDER")
    given = {name: value for name, value in flags.items() if value is not None}
    request = FuseRequest(source=model, adapter=adapter, **given)
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
    from internvl3_mlx.files import wait_silently
    from internvl3_mlx.loading.fetch_adapter import fetch_adapter

    folder, target = fetch_adapter(request.adapter), expand_user(request.target or "")
    source = find_source(request.source, request.revision)
    modules = convert_adapter_layout(
        folder,
        target,
        source,
        request.to,
        overwrite=request.overwrite,
        on_wait=wait_silently if request.quiet else console.note,
    )
    report = {"adapter": str(folder), "target": str(target), "layout": request.to}
    show_convert_report(request, {**report, "modules": len(modules)})
