"""One conversion as the command line asks for it: checked, run, shown."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, progress
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.convert.calibration.calibrate import Calibration
    from internvl3_mlx.convert.pipeline import ConvertedCheckpoint
    from internvl3_mlx.convert.recipes import QuantizationRecipe

QUANTIZATION_FLAGS = (
    "q_bits",
    "q_group_size",
    "q_mode",
    "q_vision",
    "recipe",
    "calibrate",
    "target_bpw",
)
TARGET_BPW = 4.5
FIGURE_KEYS = {"measured", "calibration", "proof_kl"}  # of a report: shown with all their digits


@dataclass(frozen=True, kw_only=True)
class CheckpointRequest:
    """What every command that writes a checkpoint is told."""

    source: str
    target: str | None
    to: str
    dtype: str | None
    dequantize: bool
    overwrite: bool
    verify: bool
    upload_repo: str | None
    private: bool
    yes: bool
    revision: str | None
    as_json: bool
    quiet: bool

    @property
    def quantizes(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(CheckpointRequest):
    """The command line of a conversion, as one value."""

    quantize: bool
    q_bits: int | None
    q_group_size: int | None
    q_mode: str | None
    q_vision: int | None
    recipe: str | None
    calibrate: str | None
    target_bpw: float | None
    epochs: int | None
    feedback: bool
    measure: bool
    samples: str | None
    dry_run: bool

    @property
    def quantizes(self) -> bool:
        return self.quantize or any(getattr(self, name) is not None for name in QUANTIZATION_FLAGS)


def check_convert_request(request: ConvertRequest) -> None:
    """Refuse what contradicts itself before anything is opened or fetched."""
    own = [request.q_bits, request.q_group_size, request.q_mode]
    if request.recipe is not None and request.calibrate is not None:
        raise UserError("--recipe and --calibrate both choose the bits; give one of them")
    if request.calibrate is not None and any(value is not None for value in own):
        raise UserError("--calibrate chooses bits and groups itself; give --target-bpw instead")
    if request.calibrate is None and (request.target_bpw is not None or request.epochs is not None):
        raise UserError("--target-bpw and --epochs belong to --calibrate FOLDER; add it")
    check_upload_repo(request)


def check_upload_repo(request: CheckpointRequest) -> None:
    if request.upload_repo is not None:
        from internvl3_mlx.loading.hub import check_repo_name

        check_repo_name(request.upload_repo)


def run_convert(request: ConvertRequest) -> None:
    from internvl3_mlx.convert.api import Conversion

    started = time.perf_counter()
    source = resolve_source(request)
    session = Conversion(source, choose_target(request, source), command_for_card())
    session.check_target(overwrite=request.overwrite)
    if request.dry_run:
        return show_convert_report(
            request,
            session.dry_run(
                choose_recipe(request), request.to, request.dtype, dequantize=request.dequantize
            ),
        )
    calibration = run_calibration(request, session) if request.calibrate is not None else None
    outcome = run_conversion(request, session, calibration)
    figures = measure_quality(request, session) if request.measure else None
    session.write_card(outcome, figures)
    report = session.report(outcome, figures, calibration)
    report["seconds"] = round(time.perf_counter() - started, 2)
    if request.upload_repo is not None:
        report["uploaded"] = upload_result(request, session)
    show_convert_report(request, report)
    return None


def resolve_source(request: CheckpointRequest) -> Path:
    """Find or fetch the source. Only the disk must hold it: conversion does not load the model."""
    from internvl3_mlx.loading import hub
    from internvl3_mlx.loading.resolve import resolve_model

    place = resolve_model(request.source)
    if place.folder is not None:
        return place.folder
    assert place.repo is not None
    if folder := hub.cached_snapshot(place.repo, request.revision):
        return folder
    remote = hub.repo_info(place.repo, request.revision)
    hub.check_free_disk(remote, quantized=request.quantizes)
    if not request.quiet:
        console.note(f"downloading {place.repo}, {console.format_size(remote.nbytes)}")
    return hub.download(remote, request.revision)


def choose_target(request: ConvertRequest, source: Path) -> Path:
    """Take --mlx-path, or name the folder after the model and what is made of it."""
    if request.target is not None:
        return Path(request.target).expanduser()
    from internvl3_mlx.convert.api import default_target_name

    recipe = choose_recipe(request)
    bpw = request.target_bpw or TARGET_BPW
    kind = recipe.name if recipe else f"{bpw:g}bpw" if request.calibrate else request.to
    return Path(default_target_name(source, kind))


def choose_recipe(request: ConvertRequest) -> "QuantizationRecipe | None":
    """Build the recipe that the flags name; None for a dense result or a calibrated one."""
    if not request.quantizes or request.calibrate is not None:
        return None
    from internvl3_mlx.convert import recipes
    from internvl3_mlx.convert.recipes import read_recipe

    if request.recipe is None:
        return recipes.uniform_recipe(
            request.q_bits,
            request.q_group_size,
            request.q_mode or "affine",
            vision_bits=request.q_vision,
        )
    if request.q_bits is not None or request.q_mode is not None:
        raise UserError("--recipe names the bits; leave out --q-bits and --q-mode")
    if Path(request.recipe).suffix in (".yaml", ".yml"):
        return read_recipe(Path(request.recipe).expanduser())
    return recipes.mixed_recipe(request.recipe, request.q_group_size, vision_bits=request.q_vision)


def run_calibration(request: ConvertRequest, session: Any) -> "Calibration":
    from internvl3_mlx.convert.calibration.calibrate import EPOCHS, CalibrationConfig

    assert request.calibrate is not None
    wish = CalibrationConfig(
        target_bpw=request.target_bpw or TARGET_BPW,
        vision_bits=request.q_vision,
        epochs=EPOCHS if request.epochs is None else request.epochs,
        gptq=request.feedback,
        dtype=request.dtype,
    )
    with progress.progress_bar(quiet=request.quiet) as advance:
        found: Calibration = session.calibrate(Path(request.calibrate).expanduser(), wish, advance)
    return found


def run_conversion(
    request: ConvertRequest, session: Any, calibration: "Calibration | None"
) -> "ConvertedCheckpoint":
    from internvl3_mlx.convert.pipeline import ConvertOptions

    chosen = ConvertOptions(
        layout=request.to,
        dtype=request.dtype,
        dequantize=request.dequantize,
        overwrite=request.overwrite,
        check_output=request.verify,
        calibrated_weights=calibration.weights if calibration else {},
    )
    recipe = calibration.recipe if calibration else choose_recipe(request)
    with progress.progress_bar(quiet=request.quiet, counts_bytes=True) as advance:
        outcome: ConvertedCheckpoint = session.convert(recipe, chosen, advance)
    return outcome


def measure_quality(request: ConvertRequest, session: Any) -> Any:
    folder = request.samples or request.calibrate
    with console.spinner("measuring", quiet=request.quiet):
        return session.measure(Path(folder).expanduser() if folder else None)


def upload_result(request: CheckpointRequest, session: Any) -> str:
    from internvl3_mlx.loading.hub import upload

    def ask(question: str) -> bool:
        return request.yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    assert request.upload_repo is not None
    with console.spinner(f"uploading to {request.upload_repo}", quiet=request.quiet) as notify:
        done = upload(
            session.target,
            request.upload_repo,
            lambda q: _confirm(notify, ask, q),
            private=request.private,
        )
    return done.url


def _confirm(notify: Any, ask: Any, question: str) -> bool:
    notify("about to replace a repository")
    return bool(ask(question))


def show_convert_report(request: CheckpointRequest, report: dict[str, Any]) -> None:
    if request.as_json:
        console.print_json(report, indent=2)
    else:
        console.print_table(readable_report(report))


def readable_report(report: dict[str, Any]) -> dict[str, Any]:
    """Give what is counted in bytes a unit, and small figures their digits."""
    shown = {name: value for name, value in report.items() if value not in ({}, [])}
    for name in FIGURE_KEYS & shown.keys():
        shown[name] = format_figures(shown[name])
    return {
        ("size" if name == "nbytes" else name): console.format_size(value)
        if name == "nbytes"
        else value
        for name, value in shown.items()
    }


def format_figures(value: Any) -> Any:
    """Write a KL of 0.00213 in full: the screen would round it to 0."""
    if isinstance(value, dict):
        return {name: format_figures(item) for name, item in value.items()}
    if isinstance(value, list):
        return [format_figures(item) for item in value]
    return f"{value:.5f}" if isinstance(value, float) else value


def command_for_card() -> str:
    """Repeat the command for the card, which may be published: of folders here only the names."""
    import shlex

    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return shlex.join(["internvl3", *words])
