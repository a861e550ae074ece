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
    from internvl3_mlx.convert.pipeline import Outcome
    from internvl3_mlx.convert.recipes import Recipe

PACKING = ("q_bits", "q_group_size", "q_mode", "q_vision", "recipe", "calibrate", "target_bpw")
TARGET_BPW = 4.5
FIGURES = {"measured", "calibration", "proof_kl"}  # of a report: shown with all their digits


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every command that writes a checkpoint is told."""

    source: str
    target: str | None
    to: str
    dtype: str | None
    dequantize: bool
    overwrite: bool
    proof: bool
    upload_repo: str | None
    private: bool
    yes: bool
    revision: str | None
    as_json: bool
    quiet: bool

    @property
    def packs(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Request(Asked):
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
    def packs(self) -> bool:
        return self.quantize or any(getattr(self, name) is not None for name in PACKING)


def check(request: Request) -> None:
    """Refuse what contradicts itself before anything is opened or fetched."""
    own = [request.q_bits, request.q_group_size, request.q_mode]
    if request.recipe is not None and request.calibrate is not None:
        raise UserError("--recipe and --calibrate both choose the bits; give one of them")
    if request.calibrate is not None and any(value is not None for value in own):
        raise UserError("--calibrate chooses bits and groups itself; give --target-bpw instead")
    if request.calibrate is None and (request.target_bpw is not None or request.epochs is not None):
        raise UserError("--target-bpw and --epochs belong to --calibrate FOLDER; add it")
    check_upload(request)


def check_upload(request: Asked) -> None:
    if request.upload_repo is not None:
        from internvl3_mlx.loading.hub import check_name

        check_name(request.upload_repo)


def run(request: Request) -> None:
    from internvl3_mlx.convert.api import Session

    started = time.perf_counter()
    source = local_source(request)
    session = Session(source, target_folder(request, source), command_line())
    session.check(overwrite=request.overwrite)
    if request.dry_run:
        return show(
            request,
            session.planned(
                chosen_recipe(request), request.to, request.dtype, dequantize=request.dequantize
            ),
        )
    calibration = calibrated(request, session) if request.calibrate is not None else None
    outcome = converted(request, session, calibration)
    figures = measured(request, session) if request.measure else None
    session.write_card(outcome, figures)
    report = session.report(outcome, figures, calibration)
    report["seconds"] = round(time.perf_counter() - started, 2)
    if request.upload_repo is not None:
        report["uploaded"] = uploaded(request, session)
    show(request, report)
    return None


def local_source(request: Asked) -> Path:
    """Find or fetch the source. Only the disk must hold it: conversion does not load the model."""
    from internvl3_mlx.loading import hub
    from internvl3_mlx.loading.resolve import find

    place = find(request.source)
    if place.folder is not None:
        return place.folder
    assert place.repo is not None
    if folder := hub.cached_snapshot(place.repo, request.revision):
        return folder
    remote = hub.look(place.repo, request.revision)
    hub.check_disk(remote, packed=request.packs)
    if not request.quiet:
        console.note(f"downloading {place.repo}, {console.size(remote.nbytes)}")
    return hub.fetch(remote, request.revision)


def target_folder(request: Request, source: Path) -> Path:
    """Take --mlx-path, or name the folder after the model and what is made of it."""
    if request.target is not None:
        return Path(request.target).expanduser()
    from internvl3_mlx.convert.api import default_name

    recipe = chosen_recipe(request)
    bpw = request.target_bpw or TARGET_BPW
    kind = recipe.name if recipe else f"{bpw:g}bpw" if request.calibrate else request.to
    return Path(default_name(source, kind))


def chosen_recipe(request: Request) -> "Recipe | None":
    """Build the recipe that the flags name; None for a dense result or a calibrated one."""
    if not request.packs or request.calibrate is not None:
        return None
    from internvl3_mlx.convert import recipes
    from internvl3_mlx.convert.recipes import read_recipe

    if request.recipe is None:
        return recipes.recipe(
            request.q_bits,
            request.q_group_size,
            request.q_mode or "affine",
            vision=request.q_vision,
        )
    if request.q_bits is not None or request.q_mode is not None:
        raise UserError("--recipe names the bits; leave out --q-bits and --q-mode")
    if Path(request.recipe).suffix in (".yaml", ".yml"):
        return read_recipe(Path(request.recipe).expanduser())
    return recipes.mixed(request.recipe, request.q_group_size, vision=request.q_vision)


def calibrated(request: Request, session: Any) -> "Calibration":
    from internvl3_mlx.convert.calibration.calibrate import EPOCHS, Wish

    assert request.calibrate is not None
    wish = Wish(
        target_bpw=request.target_bpw or TARGET_BPW,
        tower_bits=request.q_vision,
        epochs=EPOCHS if request.epochs is None else request.epochs,
        feedback=request.feedback,
        dtype=request.dtype,
    )
    with progress.bar(quiet=request.quiet) as advance:
        found: Calibration = session.calibrate(Path(request.calibrate).expanduser(), wish, advance)
    return found


def converted(request: Request, session: Any, calibration: "Calibration | None") -> "Outcome":
    from internvl3_mlx.convert.pipeline import Options

    chosen = Options(
        layout=request.to,
        dtype=request.dtype,
        dequantize=request.dequantize,
        overwrite=request.overwrite,
        compare=request.proof,
        learned=calibration.learned if calibration else {},
    )
    recipe = calibration.recipe if calibration else chosen_recipe(request)
    with progress.bar(quiet=request.quiet, counts_bytes=True) as advance:
        outcome: Outcome = session.convert(recipe, chosen, advance)
    return outcome


def measured(request: Request, session: Any) -> Any:
    folder = request.samples or request.calibrate
    with console.waiting("measuring", quiet=request.quiet):
        return session.measure(Path(folder).expanduser() if folder else None)


def uploaded(request: Asked, session: Any) -> str:
    from internvl3_mlx.loading.hub import upload

    def ask(question: str) -> bool:
        return request.yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    assert request.upload_repo is not None
    with console.waiting(f"uploading to {request.upload_repo}", quiet=request.quiet) as notify:
        done = upload(
            session.target,
            request.upload_repo,
            lambda q: _asked(notify, ask, q),
            private=request.private,
        )
    return done.url


def _asked(notify: Any, ask: Any, question: str) -> bool:
    notify("about to replace a repository")
    return bool(ask(question))


def show(request: Asked, report: dict[str, Any]) -> None:
    if request.as_json:
        console.as_json(report, indent=2)
    else:
        console.facts(readable(report))


def readable(report: dict[str, Any]) -> dict[str, Any]:
    """Give what is counted in bytes a unit, and small figures their digits."""
    shown = {name: value for name, value in report.items() if value not in ({}, [])}
    for name in FIGURES & shown.keys():
        shown[name] = digits(shown[name])
    return {
        ("size" if name == "nbytes" else name): console.size(value) if name == "nbytes" else value
        for name, value in shown.items()
    }


def digits(value: Any) -> Any:
    """Write a KL of 0.00213 in full: the screen would round it to 0."""
    if isinstance(value, dict):
        return {name: digits(item) for name, item in value.items()}
    if isinstance(value, list):
        return [digits(item) for item in value]
    return f"{value:.5f}" if isinstance(value, float) else value


def command_line() -> str:
    """Repeat the command for the card, which may be published: of folders here only the names."""
    import shlex

    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return shlex.join(["internvl3", *words])
