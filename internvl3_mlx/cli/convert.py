"""``internvl3 convert``: reads any layout; writes MLX or PyTorch, quantized or not."""

from typing import Any

import click

from internvl3_mlx.cli import options
from internvl3_mlx.cli.convert_run import ConvertRequest, run_convert
from internvl3_mlx.cli.flags import SectionedCommand, flag, flags_from
from internvl3_mlx.errors import UserError

# flags of other commands, and former ones -> ours
SUGGESTIONS = {
    "--samples": "--measure-images",
    "--recipe": "--quant-predicate",
    "--proof": "--verify",
    "--no-proof": "--no-verify",
    "--feedback": "--gptq",
    "--no-feedback": "--no-gptq",
}


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
    suggestions=SUGGESTIONS,
)
@click.argument("source", required=False, metavar="[PATH|REPO|SIZE]")
@flag(
    "Model", "--model", "--hf-path", "named", metavar="PATH|REPO|SIZE",
    help="The model, instead of the argument.",
)  # fmt: skip
@flags_from(ConvertRequest)
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def convert_command(source: str | None, named: str | None, **flags: Any) -> None:
    """Convert a checkpoint of any layout, quantize it, measure it, upload it.

    Weights are streamed: memory use stays small for a model of any size, unless --calibrate or
    --measure need the model itself. The result appears when it is complete and verified.
    """
    model = named if source is None else source
    if model is None or (named is not None and source is not None and named != source):
        raise UserError("name one model to convert: a folder, a repository or a size such as 2b")
    given = {name: value for name, value in flags.items() if value is not None}
    run_convert(ConvertRequest(source=model, **given))
