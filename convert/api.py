"""One conversion from first to last: plan, calibrate, convert, measure, card. What the command line
and others call."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from internvl3_mlx import demo
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.writer import check_free
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.calibrate import (
    Calibration,
    Progress,
    Wish,
    calibrate,
    measure,
)
from internvl3_mlx.convert.calibration.metrics import Figures, bits_by_part
from internvl3_mlx.convert.model_card import Facts, base_model, read_licence, write_card
from internvl3_mlx.convert.pipeline import Options, Outcome, check_places, convert
from internvl3_mlx.convert.plan import make_plan
from internvl3_mlx.convert.recipes import Recipe
from internvl3_mlx.prompt.tokenizer_files import read_json

LIBRARIES = ("internvl3-mlx", "mlx", "huggingface-hub")
OWN_SAMPLES = Path(demo.__file__).parent / "samples"
WORST = 8  # units named in a report


@dataclass(frozen=True)
class Session:
    """Source, target and the command that asked for it; and the adapter that is fused, if any."""

    source: Path
    target: Path
    command: str
    adapter: Path | None = None

    def check(self, *, overwrite: bool) -> None:
        """Refuse a target that may not be written, before any work is done for it."""
        check_places(self.source, self.target)
        check_free(self.target, overwrite=overwrite)

    def planned(
        self, recipe: Recipe | None, layout: str, dtype: str | None, *, dequantize: bool
    ) -> dict[str, Any]:
        """Say what would be written, from headers alone."""
        plan = make_plan(self.source, recipe, layout=layout, dtype=dtype, dequantize=dequantize)
        entries = plan.entries()
        return {
            "source": str(self.source),
            "target": str(self.target),
            "layout": layout,
            "nbytes": sum(entry.nbytes for entry in entries),
            "tensors": len(entries),
            "packing": packings(plan.packed),
            "left_dense": plan.left_dense,
        }

    def calibrate(self, pictures: Path, wish: Wish, advance: Progress) -> Calibration:
        return calibrate(self.source, pictures, wish, advance)

    def convert(self, recipe: Recipe | None, options: Options, advance: Progress) -> Outcome:
        steps = convert(self.source, self.target, recipe, options)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            advance("writing", step.done, step.total)

    def measure(self, pictures: Path | None) -> Figures:
        return measure(self.source, self.target, pictures or OWN_SAMPLES)

    def write_card(self, outcome: Outcome, figures: Figures | None) -> str:
        content = read_json(self.source / "config.json")
        facts = Facts(
            name=self.target.name,
            base=base_model(self.source, content),
            layout=outcome.layout,
            nbytes=outcome.nbytes,
            command=self.command,
            versions={name: installed(name) for name in LIBRARIES},
            bits=bits_by_part(self.target),
            packed=outcome.packed,
            left_dense=outcome.left_dense,
            tensors=len(open_checkpoint(self.target).tensors),
            figures=figures,
            forward=outcome.forward,
            adapter=None if self.adapter is None else self.adapter.resolve().name,
        )
        return write_card(self.target, facts, read_licence(self.source))

    def report(
        self, outcome: Outcome, figures: Figures | None, calibration: Calibration | None
    ) -> dict[str, Any]:
        """Tell what was done, as plain values."""
        found: dict[str, Any] = {
            "source": str(self.source),
            "target": str(self.target),
            "layout": outcome.layout,
            "nbytes": outcome.nbytes,
            "files": outcome.files,
            "bits_per_parameter": {
                name: round(bits, 2) for name, bits in bits_by_part(self.target).items()
            },
            "packing": packings(outcome.packed),
            "left_dense": dict(outcome.left_dense),
        }
        if calibration is not None:
            found["calibration"] = calibration_report(calibration)
        if outcome.forward is not None:
            found["proof_kl"] = round(outcome.forward.kl, 6)
        if figures is not None:
            found["measured"] = {k: round(v, 6) for k, v in figures.to_dict().items()}
        return found


def packings(packed: Mapping[str, Quantization]) -> list[dict[str, Any]]:
    """Count modules by how they are packed."""
    forms = sorted(set(packed.values()), key=lambda form: (form.bits, form.group_size, form.mode))
    return [{**asdict(f), "modules": sum(form == f for form in packed.values())} for f in forms]


def calibration_report(calibration: Calibration) -> dict[str, Any]:
    chosen = sorted(calibration.allocation.chosen.values(), key=lambda entry: -entry.kl)
    worst = [
        {"module": e.modules[0], "bits": e.form.bits, "group_size": e.form.group_size, "kl": e.kl}
        for e in chosen[:WORST]
    ]
    return {
        "samples": calibration.samples,
        "bits_per_weight": round(calibration.allocation.bpw, 3),
        "expected_kl": round(calibration.allocation.expected_kl, 6),
        "costliest": worst,
    }


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def default_name(source: Path, kind: str) -> str:
    """Name a target as the hub's habit is: InternVL3-2B-4bit."""
    return f"{base_model(source, {}).rsplit('/', maxsplit=1)[-1]}-{kind}"
