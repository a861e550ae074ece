"""``internvl3 convert``: any layout in, MLX or PyTorch out, quantized or not."""

from typing import Any

import click

from internvl3_mlx.cli import options
from internvl3_mlx.cli.convert_run import ConvertRequest, check_convert_request, run_convert
from internvl3_mlx.cli.flags import Function, SectionedCommand, flag
from internvl3_mlx.errors import UserError

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
LAYOUTS = ("mlx", "original", "hf")
DTYPE_NAMES = ("float32", "float16", "bfloat16")

# names of other programs and of other commands -> ours
SUGGESTIONS = {
    "--samples": "--measure-data",
    "--recipe": "--quant-predicate",
    "--proof": "--verify",
    "--no-proof": "--no-verify",
    "--feedback": "--gptq",
    "--no-feedback": "--no-gptq",
}

# the flags of every command that writes a checkpoint
CHECKPOINT_FLAGS = (
    flag(
        "Model", "--revision", "revision", metavar="NAME", help="Branch, tag or commit on the hub."
    ),
    flag(
        "Model",
        "--to",
        "to",
        type=click.Choice(LAYOUTS),
        default="mlx",
        show_default=True,
        help="Layout of the result: MLX, or PyTorch under the original's or transformers' names.",
    ),
    flag(
        "Model",
        "--dtype",
        "dtype",
        type=click.Choice(DTYPE_NAMES),
        show_default="as stored",
        help="Type of what is not packed.",
    ),
    flag("Model", "--overwrite", "overwrite", is_flag=True, help="Replace FOLDER if it exists."),
    flag("Upload", "--upload-repo", "upload_repo", metavar="OWNER/NAME", help="Put it on the hub."),
    flag("Upload", "--private", "private", is_flag=True, help="Make a new repository private."),
    flag("Upload", "-y", "--yes", "yes", is_flag=True, help="Do not ask before replacing."),
    flag("Output", "--json", "as_json", is_flag=True, help="One JSON object."),
    flag("Output", "--quiet", "quiet", is_flag=True, help="No notes, no progress."),
)


def checkpoint_flags(command: Function) -> Function:
    """Give ``command`` the flags that conversions and fusions share, each written once."""
    for declare in reversed(CHECKPOINT_FLAGS):
        command = declare(command)
    return command


@click.command(
    cls=SectionedCommand,
    short_help="Convert and quantize a checkpoint.",
    examples=(
        ("internvl3 convert 2b -q", "4-bit MLX, into ./InternVL3-2B-4bit"),
        (
            "internvl3 convert 2b --calibrate photos --target-bpw 4.5 --measure",
            "allocate bits by sensitivity, and compare the answers",
        ),
        ("internvl3 convert my-fine-tune --to hf", "back to PyTorch"),
    ),
)
@click.argument("source", required=False, metavar="[PATH|REPO|SIZE]")
@flag(
    "Model", "--hf-path", "--model", "named", metavar="PATH|REPO|SIZE", help="The same as a flag."
)
@flag("Model", "--mlx-path", "-o", "target", metavar="FOLDER", help="Where the result goes.")
@checkpoint_flags
@flag("Model", "-d", "--dequantize", "dequantize", is_flag=True, help="Unpack a packed checkpoint.")
@flag("Quantization", "-q", "--quantize", "quantize", is_flag=True, help="Pack the weights.")
@flag(
    "Quantization",
    "--q-bits",
    "q_bits",
    type=int,
    metavar="N",
    show_default="4",
    help="Bits of the language model: 2, 3, 4, 5, 6 or 8.",
)
@flag(
    "Quantization",
    "--q-group-size",
    "q_group_size",
    type=int,
    metavar="N",
    show_default="64",
    help="Weights that share a scale: 32, 64 or 128.",
)
@flag(
    "Quantization",
    "--q-mode",
    "q_mode",
    type=click.Choice(MODES),
    show_default="affine",
    help="How MLX packs.",
)
@flag(
    "Quantization",
    "--q-vision",
    "q_vision",
    type=int,
    metavar="N",
    show_default="dense",
    help="Bits of the vision tower.",
)
@flag(
    "Quantization",
    "--quant-predicate",
    "--recipe",
    "recipe",
    metavar="NAME|FILE",
    help="A mix such as mixed_4_6, or a YAML file.",
)
@flag(
    "Quality",
    "--calibrate",
    "calibrate",
    metavar="FOLDER",
    help="Allocate bits by measured sensitivity on the images in FOLDER.",
)
@flag(
    "Quality",
    "--target-bpw",
    "target_bpw",
    type=click.FloatRange(2, 9),
    metavar="X",
    show_default="4.5",
    help="Mean bits per weight for --calibrate, scales included.",
)
@flag(
    "Quality",
    "--feedback/--no-feedback",
    "feedback",
    default=True,
    help="Use GPTQ error feedback when rounding.",
)
@flag("Quality", "--measure", "measure", is_flag=True, help="Compare answers with the source's.")
@flag(
    "Quality",
    "--samples",
    "samples",
    metavar="FOLDER",
    show_default="--calibrate's, or ours",
    help="Pictures for --measure.",
)
@flag(
    "Quality",
    "--proof/--no-proof",
    "verify",
    default=True,
    help="Run source and result on one question before the result is kept.",
)
@flag("Upload", "--dry-run", "dry_run", is_flag=True, help="Say what would be done; write nothing.")
@options.debug_flag
def convert_command(source: str | None, named: str | None, **flags: Any) -> None:
    """Convert a checkpoint of any layout, quantize it, measure it, upload it.

    Weights stream: memory stays small whatever the model's size, unless --calibrate or --measure
    ask for the model itself. The result appears when it is whole and proven.
    """
    model = named if source is None else source
    if model is None or (named is not None and source is not None and named != source):
        raise UserError("name one model to convert: a folder, a repository or a size such as 2b")
    run_convert(ConvertRequest(source=model, **flags))
