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
    CalibrationConfig,
    ProgressCallback,
    calibrate,
    compare_checkpoints,
)
from internvl3_mlx.convert.calibration.metrics import QualityMetrics, bits_per_part
from internvl3_mlx.convert.model_card import (
    CardData,
    find_base_model,
    read_license,
    write_model_card,
)
from internvl3_mlx.convert.pipeline import (
    ConvertedCheckpoint,
    ConvertOptions,
    check_overlap,
    convert_checkpoint,
)
from internvl3_mlx.convert.plan import plan_conversion
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.prompt.tokenizer_files import read_optional_json

LIBRARIES = ("internvl3-mlx", "mlx", "huggingface-hub")
DEMO_SAMPLES = Path(demo.__file__).parent / "samples"
REPORTED_UNITS = 8  # units named in a report


@dataclass(frozen=True)
class Conversion:
    """Source, target and the command that asked for it; and the adapter that is fused, if any."""

    source: Path
    target: Path
    command: str
    adapter: Path | None = None

    def check_target(self, *, overwrite: bool) -> None:
        """Refuse a target that may not be written, before any work is done for it."""
        check_overlap(self.source, self.target)
        check_free(self.target, overwrite=overwrite)

    def dry_run(
        self, recipe: QuantizationRecipe | None, layout: str, dtype: str | None, *, dequantize: bool
    ) -> dict[str, Any]:
        """Say what would be written, from headers alone."""
        plan = plan_conversion(
            self.source, recipe, layout=layout, dtype=dtype, dequantize=dequantize
        )
        entries = plan.entries()
        return {
            "source": str(self.source),
            "target": str(self.target),
            "layout": layout,
            "nbytes": sum(entry.nbytes for entry in entries),
            "tensors": len(entries),
            "packing": count_quantizations(plan.quantized),
            "left_dense": plan.skipped_modules,
        }

    def calibrate(
        self, images: Path, config: CalibrationConfig, on_progress: ProgressCallback
    ) -> Calibration:
        return calibrate(self.source, images, config, on_progress)

    def convert(
        self,
        recipe: QuantizationRecipe | None,
        options: ConvertOptions,
        on_progress: ProgressCallback,
    ) -> ConvertedCheckpoint:
        steps = convert_checkpoint(self.source, self.target, recipe, options)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                outcome: ConvertedCheckpoint = end.value
                return outcome
            on_progress("writing", step.bytes_done, step.bytes_total)

    def compare(self, images: Path | None) -> QualityMetrics:
        return compare_checkpoints(self.source, self.target, images or DEMO_SAMPLES)

    def write_card(self, outcome: ConvertedCheckpoint, figures: QualityMetrics | None) -> str:
        content = read_optional_json(self.source / "config.json")
        facts = CardData(
            name=self.target.name,
            base=find_base_model(self.source, content),
            layout=outcome.layout,
            nbytes=outcome.nbytes,
            command=self.command,
            versions={name: package_version(name) for name in LIBRARIES},
            bits_per_part=bits_per_part(self.target),
            quantized=outcome.quantized,
            skipped_modules=outcome.skipped_modules,
            num_tensors=len(open_checkpoint(self.target).tensors),
            quality=figures,
            output_check=outcome.output_check,
            adapter=None if self.adapter is None else self.adapter.resolve().name,
        )
        return write_model_card(self.target, facts, read_license(self.source))

    def report(
        self,
        outcome: ConvertedCheckpoint,
        figures: QualityMetrics | None,
        calibration: Calibration | None,
    ) -> dict[str, Any]:
        """Tell what was done, as plain values."""
        found: dict[str, Any] = {
            "source": str(self.source),
            "target": str(self.target),
            "layout": outcome.layout,
            "nbytes": outcome.nbytes,
            "files": outcome.num_files,
            "bits_per_parameter": {
                name: round(bits, 2) for name, bits in bits_per_part(self.target).items()
            },
            "packing": count_quantizations(outcome.quantized),
            "left_dense": dict(outcome.skipped_modules),
        }
        if calibration is not None:
            found["calibration"] = calibration_report(calibration)
        if outcome.output_check is not None:
            found["proof_kl"] = round(outcome.output_check.kl, 6)
        if figures is not None:
            found["measured"] = {k: round(v, 6) for k, v in figures.to_dict().items()}
        return found


def count_quantizations(packed: Mapping[str, Quantization]) -> list[dict[str, Any]]:
    """Count modules by how they are packed."""
    forms = sorted(set(packed.values()), key=lambda form: (form.bits, form.group_size, form.mode))
    return [{**asdict(f), "modules": sum(form == f for form in packed.values())} for f in forms]


def calibration_report(calibration: Calibration) -> dict[str, Any]:
    chosen = sorted(calibration.allocation.chosen.values(), key=lambda entry: -entry.kl)
    worst = [
        {
            "module": e.modules[0],
            "bits": e.quantization.bits,
            "group_size": e.quantization.group_size,
            "kl": e.kl,
        }
        for e in chosen[:REPORTED_UNITS]
    ]
    return {
        "samples": calibration.num_samples,
        "bits_per_weight": round(calibration.allocation.bits_per_weight, 3),
        "expected_kl": round(calibration.allocation.expected_kl, 6),
        "costliest": worst,
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def default_target_name(source: Path, kind: str) -> str:
    """Name a target as the hub's habit is: InternVL3-2B-4bit."""
    return f"{find_base_model(source, {}).rsplit('/', maxsplit=1)[-1]}-{kind}"
