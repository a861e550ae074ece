"""Run a conversion that the command line asks for, and show its report."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, progress
from internvl3_mlx.option_fields import check_bounds, config_field

if TYPE_CHECKING:
    from internvl3_mlx.convert.api import ConversionProgress, ConversionResult

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
LAYOUTS = ("mlx", "original", "hf")
PARTS = ("all", "language")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
QUANTIZATION_FLAGS = (
    "q_bits",
    "q_group_size",
    "q_mode",
    "q_vision",
    "recipe",
    "calibrate",
    "target_bpw",
)
FIGURE_KEYS = {"measured", "calibration", "verification_kl"}  # shown with all their digits
KL_VERDICTS = (  # nats per token at most, and our words for it
    (0.001, "answers like its source"),
    (0.1, "answers almost like its source"),
)
BYTE_STAGES = ("download", "write")
NOTED_STAGES = ("download", "wait")  # shown as a note, without a bar


@dataclass(frozen=True, kw_only=True)
class CheckpointRequest:
    """The options shared by the commands that write a checkpoint."""

    source: str
    target: str | None = config_field(
        None,
        "Model",
        "Folder for the result.",
        metavar="FOLDER",
        flags=("-o", "--mlx-path"),
        default_text="named after the model",
    )
    revision: str | None = config_field(
        None, "Model", "Branch, tag or commit on the hub.", metavar="NAME"
    )
    to: str = config_field(
        "mlx",
        "Model",
        "Layout of the result: MLX, or PyTorch with the original's or transformers' names.",
        choices=LAYOUTS,
    )
    dtype: str | None = config_field(
        None,
        "Model",
        "Data type of the unquantized weights.",
        choices=DTYPE_NAMES,
        default_text="as stored",
    )
    dequantize: bool = config_field(
        False, "Quantization", "Dequantize a quantized checkpoint.", flags=("-d", "--dequantize")
    )
    overwrite: bool = config_field(
        False, "Model", "Replace the folder if it exists.", flags=("--overwrite",)
    )
    verify: bool = config_field(
        True,
        "Quality",
        "Compare source and result on one question before the result is put in place.",
    )
    upload_repo: str | None = config_field(
        None, "Upload", "Upload the result to this repository.", metavar="OWNER/NAME"
    )
    private: bool = config_field(
        False, "Upload", "Make a new repository private.", flags=("--private",)
    )
    yes: bool = config_field(
        False, "Upload", "Do not ask before replacing a repository.", flags=("-y", "--yes")
    )
    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.metadata:
                check_bounds(entry, getattr(self, entry.name))

    def keywords(self) -> dict[str, Any]:
        """Return the options as keywords of ``convert_model``."""
        return {
            "source": self.source,
            "target": self.target,
            "layout": self.to,
            "dtype": self.dtype,
            "dequantize": self.dequantize,
            "overwrite": self.overwrite,
            "verify": self.verify,
            "revision": self.revision,
        }


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(CheckpointRequest):
    """The options of ``internvl3 convert``."""

    part: str = config_field(
        "all",
        "Model",
        "What to write: the whole model, or its language model alone, for mlx-lm.",
        choices=PARTS,
    )
    quantize: bool = config_field(
        False, "Quantization", "Quantize the weights.", flags=("-q", "--quantize")
    )
    q_bits: int | None = config_field(
        None,
        "Quantization",
        "Bits of the language model: 2, 3, 4, 5, 6 or 8.",
        default_text="4; 6 below 0.3B parameters",
    )
    q_group_size: int | None = config_field(
        None, "Quantization", "Weights that share a scale: 32, 64 or 128.", default_text="64"
    )
    q_mode: str | None = config_field(
        None, "Quantization", "Quantization mode of MLX.", choices=MODES, default_text="affine"
    )
    q_vision: int | None = config_field(
        None, "Quantization", "Bits of the vision encoder.", default_text="not quantized"
    )
    recipe: str | None = config_field(
        None,
        "Quantization",
        "Recipe such as mixed_4_6, or a YAML file.",
        metavar="NAME|FILE",
        flags=("--quant-predicate",),
    )
    calibrate: str | None = config_field(
        None,
        "Quality",
        "Allocate bits by measured sensitivity on the images and texts in this folder.",
        metavar="FOLDER",
    )
    target_bpw: float | None = config_field(
        None,
        "Quality",
        "Mean bits per weight for --calibrate, including scales.",
        low=2,
        high=9,
        default_text="4.5",
    )
    gptq: bool = config_field(
        True, "Quality", "With --calibrate: use GPTQ error feedback when rounding."
    )
    measure: bool = config_field(
        False, "Quality", "Compare the answers with the source's.", flags=("--measure",)
    )
    measure_images: str | None = config_field(
        None,
        "Quality",
        "Images for --measure.",
        metavar="FOLDER",
        default_text="those of --calibrate, or ours",
    )
    dry_run: bool = config_field(
        False, "Output", "Show what would be written.", flags=("--dry-run",)
    )

    def keywords(self) -> dict[str, Any]:
        chosen = any(getattr(self, name) is not None for name in QUANTIZATION_FLAGS)
        # -q alone quantizes with every default: naming the default mode says so
        mode = "affine" if self.quantize and not chosen else self.q_mode
        return {
            **super().keywords(),
            "part": self.part,
            "bits": self.q_bits,
            "group_size": self.q_group_size,
            "mode": mode,
            "vision_bits": self.q_vision,
            "recipe": self.recipe,
            "calibration_images": self.calibrate,
            "target_bpw": self.target_bpw,
            "gptq": self.gptq,
            "measure": self.measure,
            "measure_images": self.measure_images,
            "dry_run": self.dry_run,
        }


def check_upload_repo(request: CheckpointRequest) -> None:
    """Refuse a bad repository name before anything is converted."""
    if request.upload_repo is not None:
        from internvl3_mlx.loading.hub import check_repo_name

        check_repo_name(request.upload_repo)


def run_convert(request: CheckpointRequest) -> None:
    """Convert, upload if asked to, and show the report."""
    from internvl3_mlx.conversion import convert_model

    check_upload_repo(request)
    with conversion_progress(quiet=request.quiet) as on_progress:
        result = convert_model(
            **request.keywords(), command=command_for_card(), on_progress=on_progress
        )
    report = result.to_dict()
    if request.upload_repo is not None and not result.dry_run:
        report["uploaded"] = upload_result(request, result)
    show_convert_report(request, report)


@contextmanager
def conversion_progress(*, quiet: bool) -> Iterator[Callable[["ConversionProgress"], None]]:
    """Show a note for a download or a wait and a bar for every other stage of a conversion."""
    with ExitStack() as stack:
        stage = ""
        advance: progress.ProgressCallback = _ignore

        def show(event: "ConversionProgress") -> None:
            nonlocal stage, advance
            if event.stage != stage:
                stack.close()
                stage = event.stage
                if stage in NOTED_STAGES and not quiet:
                    size = f", {console.format_size(event.total)}" if event.total else ""
                    console.note(event.message + size)
                counts_bytes = stage in BYTE_STAGES
                bar = progress.progress_bar(quiet=quiet, counts_bytes=counts_bytes)
                advance = _ignore if stage in NOTED_STAGES else stack.enter_context(bar)
            advance(event.message, event.done, event.total)

        yield show


def _ignore(*_: object) -> None:
    """Show nothing."""


def upload_result(request: CheckpointRequest, result: "ConversionResult") -> str:
    """Upload the target, after a confirmation if a repository is replaced; return its address."""
    from internvl3_mlx.loading.hub import upload

    def ask(question: str) -> bool:
        return request.yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    assert request.upload_repo is not None
    with console.spinner(f"uploading to {request.upload_repo}", quiet=request.quiet) as notify:
        done = upload(
            result.target,
            request.upload_repo,
            lambda q: _confirm(notify, ask, q),
            private=request.private,
        )
    return done.url


def _confirm(notify: Any, ask: Any, question: str) -> bool:
    notify("about to replace a repository")
    return bool(ask(question))


def show_convert_report(request: CheckpointRequest, report: dict[str, Any]) -> None:
    """Print a report as JSON or as a table."""
    if request.as_json:
        console.print_json(report, indent=2)
    else:
        console.print_table(readable_report(report))


def readable_report(report: dict[str, Any]) -> dict[str, Any]:
    """Give bytes a unit and small figures all their digits, for people to read."""
    verdict = conversion_verdict(report)
    shown: dict[str, Any] = {"verdict": verdict} if verdict else {}
    shown |= {name: value for name, value in report.items() if value not in ({}, [])}
    for name in FIGURE_KEYS & shown.keys():
        shown[name] = format_figures(shown[name])
    return {
        ("size" if name == "nbytes" else name): console.format_size(value)
        if name == "nbytes"
        else value
        for name, value in shown.items()
    }


def conversion_verdict(report: dict[str, Any]) -> str:
    """Say in one line how the result compares with its source; nothing if it was not compared."""
    top1 = report.get("measured", {}).get("top1")
    if top1 is not None:
        return f"chooses the same token as the source in {100 * top1:.1f} of 100 cases"
    kl = report.get("verification_kl")
    if kl is None:
        return ""
    for limit, words in KL_VERDICTS:
        if kl <= limit:
            return f"{words} on one question; --measure compares more"
    return "answers differently from its source on one question; check it with --measure"


def format_figures(value: Any) -> Any:
    """Write a KL divergence of 0.00213 in full: a table would round it to 0."""
    if isinstance(value, dict):
        return {name: format_figures(item) for name, item in value.items()}
    if isinstance(value, list):
        return [format_figures(item) for item in value]
    return f"{value:.5f}" if isinstance(value, float) else value


def command_for_card() -> str:
    """Return the command for the model card, which may be published: local folders by name only."""
    import shlex

    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return shlex.join(["internvl3", *words])
