"""One conversion from start to finish: calibrate, convert, compare, write the model card.

``internvl3_mlx.convert_model`` and through it ``internvl3 convert`` and ``internvl3 fuse`` run
this.
"""

import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from internvl3_mlx import demo
from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT
from internvl3_mlx.checkpoints.reader import PART_NAMES, open_checkpoint, parameters_by_part
from internvl3_mlx.config import Quantization, read_config
from internvl3_mlx.convert.aux_files import replaceable_folder
from internvl3_mlx.convert.calibration.calibrate import (
    Calibration,
    CalibrationConfig,
    calibrate,
    compare_checkpoints,
)
from internvl3_mlx.convert.calibration.metrics import (
    OutputCheck,
    QualityMetrics,
    bits_per_part,
    describe_quality,
)
from internvl3_mlx.convert.model_card import (
    CardData,
    find_base_model,
    model_card,
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
from internvl3_mlx.convert.raw_check import RawCheck
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.device import use_full_float32
from internvl3_mlx.files import atomic_write, check_unused
from internvl3_mlx.json_files import read_optional_json

LANGUAGE_MODEL = "language_model"  # the part
LIBRARIES = ("internvl3-mlx", "mlx", "huggingface-hub")
DEMO_SAMPLES = Path(demo.__file__).parent / "samples"
REPORTED_UNITS = 8  # groups of modules named in a report, the most sensitive ones
NOT_COMPARED = (
    "not compared, since that would have taken longer than the conversion, or too much memory; "
    "--measure takes the time it needs"
)
DIGITS = 6  # of a KL divergence in a report

Stage = Literal["download", "wait", "calibrate", "write", "measure"]


@dataclass(frozen=True)
class ConversionProgress:
    """How far a conversion is: ``done`` of ``total`` bytes in the stages ``download`` and
    ``write``, steps in the others. ``total`` is 0 where it is not known in advance."""

    stage: Stage
    message: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """What ``convert_model`` wrote, or with ``dry_run`` would have written.

    ``quantized`` maps module paths to their quantization; ``skipped_modules`` maps those that could
    not be quantized to their widths, which no group size divides. ``unused_tensors`` were left out:
    the published model never reads them. ``output_check`` compares source and target on one
    generated question and on a passage of English; ``quality`` compares them on ``measure_images``.
    ``raw_check`` says how much a second reading of both files has compared.
    """

    source: Path
    target: Path
    layout: str
    num_bytes: int
    num_tensors: int
    quantized: Mapping[str, Quantization]
    skipped_modules: Mapping[str, int]
    unused_tensors: tuple[str, ...] = ()
    dry_run: bool = False
    num_files: int = 0
    bits_per_part: Mapping[str, float] = field(default_factory=dict[str, float])
    adapter: Path | None = None
    calibration: Calibration | None = None
    verified: bool = False
    output_check: OutputCheck | None = None
    raw_check: RawCheck | None = None
    quality: QualityMetrics | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str | None:
        """Say how the target compares with the source on plain English; None if not asked for."""
        if self.output_check is not None:
            return describe_quality(self.output_check.text)
        return NOT_COMPARED if self.verified and not self.dry_run else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; what was not done is left out."""
        report = {
            "adapter": self.adapter and str(self.adapter),
            "source": str(self.source),
            "target": str(self.target),
            "layout": self.layout,
            "nbytes": self.num_bytes,
            "files": self.num_files or None,
            "tensors": self.num_tensors,
            "bits_per_parameter": {k: round(v, 2) for k, v in self.bits_per_part.items()} or None,
            "quantization": count_quantizations(self.quantized),
            "skipped_modules": dict(self.skipped_modules),
            "unused_tensors": [*self.unused_tensors] or None,
            "calibration": self.calibration and calibration_report(self.calibration),
            "verification_kl": self.output_check and round(self.output_check.kl, DIGITS),
            "reading_kl": self.output_check and self.output_check.reading,
            "second_reading": self.raw_check and asdict(self.raw_check),
            "verdict": self.verdict,
            "measured": self.quality
            and {name: round(value, DIGITS) for name, value in self.quality.to_dict().items()},
            "seconds": None if self.dry_run else round(self.seconds, 2),
        }
        return {name: value for name, value in report.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that is ready to run. ``calibration`` replaces ``recipe``; ``command`` is what
    the model card gives as its origin."""

    source: Path
    target: Path
    options: ConvertOptions
    recipe: QuantizationRecipe | None = None
    calibration: CalibrationConfig | None = None
    measure: bool = False
    measure_images: Path | None = None
    command: str = ""

    def check_target(self) -> None:
        """Refuse a target that must not be written, before any work is done for it."""
        check_overlap(self.source, self.target, self.options.adapter)
        check_unused(
            self.target,
            overwrite=self.options.overwrite,
            replaceable=replaceable_folder(self.source),
        )

    def plan(self) -> ConversionResult:
        """Return what would be written, from the headers alone."""
        self.check_target()
        plan = plan_conversion(
            self.source,
            self.recipe,
            layout=self.options.layout,
            dtype=self.options.dtype,
            dequantize=self.options.dequantize,
            adapter=self.options.adapter,
        )
        entries = plan.entries()
        return ConversionResult(
            source=self.source,
            target=self.target,
            layout=plan.layout,
            num_bytes=sum(entry.nbytes for entry in entries),
            num_tensors=len(entries),
            quantized=plan.quantized,
            skipped_modules=plan.skipped_modules,
            unused_tensors=plan.unused_tensors,
            dry_run=True,
            adapter=self.options.adapter,
        )

    def run(self) -> Generator[ConversionProgress, None, ConversionResult]:
        """Convert, yielding progress; return the result once the target is complete."""
        started = time.perf_counter()
        use_full_float32()
        self.check_target()
        calibration, recipe, options = None, self.recipe, self.options
        if self.calibration is not None:
            calibration = yield from calibration_progress(self.source, self.calibration)
            recipe = calibration.recipe
            options = replace(
                options,
                calibrated_weights=calibration.weights,
                spent_seconds=time.perf_counter() - started,
            )
        results: list[ConversionResult] = []  # filled before the target takes its name

        def write_extra(folder: Path, converted: ConvertedCheckpoint) -> None:
            result = self.describe(folder, converted, calibration)
            results.append(result)
            write_model_card(folder, *self.card(result))

        yield from writing_progress(
            self.source, self.target, recipe, replace(options, write_extra=write_extra)
        )
        result = results[0]
        if self.measure:
            yield ConversionProgress("measure", "comparing source and target")
            images = self.measure_images or DEMO_SAMPLES
            quality = compare_checkpoints(self.source, self.target, images)
            result = replace(result, quality=quality)
            with atomic_write(self.target / "README.md") as part:
                part.write_text(model_card(*self.card(result)), encoding="utf-8")
        return replace(result, seconds=time.perf_counter() - started)

    def describe(
        self, folder: Path, converted: ConvertedCheckpoint, calibration: Calibration | None
    ) -> ConversionResult:
        """Return the result of a conversion whose files are still in ``folder``."""
        return ConversionResult(
            source=self.source,
            target=self.target,
            layout=converted.layout,
            num_bytes=converted.nbytes,
            num_tensors=len(open_checkpoint(folder).tensors),
            num_files=converted.num_files,
            quantized=converted.quantized,
            skipped_modules=converted.skipped_modules,
            unused_tensors=converted.unused_tensors,
            bits_per_part=self.measure_bits(folder, converted),
            adapter=self.options.adapter,
            calibration=calibration,
            verified=self.options.check_output and not converted.merged,
            output_check=converted.output_check,
            raw_check=converted.raw_check,
        )

    def measure_bits(self, folder: Path, converted: ConvertedCheckpoint) -> dict[str, float]:
        """Return the mean bits per parameter of each part that was written."""
        if converted.layout != LANGUAGE_LAYOUT:
            return bits_per_part(folder)
        source, config = open_checkpoint(self.source), read_config(self.source)
        parameters = parameters_by_part(source, config)[LANGUAGE_MODEL].parameters
        return {PART_NAMES[LANGUAGE_MODEL]: 8 * converted.nbytes / parameters}

    def card(self, result: ConversionResult) -> tuple[CardData, dict[str, Any]]:
        """Return what the model card says, and the license fields of the source's own card."""
        return card_data(result, self.command), read_license(result.source)


def calibration_progress(
    source: Path, config: CalibrationConfig
) -> Generator[ConversionProgress, None, Calibration]:
    """Calibrate, yielding a step for each group of modules measured and each layer rounded."""
    steps = calibrate(source, config)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            calibration: Calibration = end.value
            return calibration
        yield ConversionProgress("calibrate", step.message, step.done, step.total)


def writing_progress(
    source: Path, target: Path, recipe: QuantizationRecipe | None, options: ConvertOptions
) -> Generator[ConversionProgress, None, ConvertedCheckpoint]:
    """Convert, yielding the bytes written after every tensor."""
    steps = convert_checkpoint(source, target, recipe, options)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            converted: ConvertedCheckpoint = end.value
            return converted
        yield ConversionProgress("write", f"writing {step.name}", step.bytes_done, step.bytes_total)


def card_data(result: ConversionResult, command: str) -> CardData:
    """Collect what the model card says."""
    adapter = result.adapter
    return CardData(
        name=result.target.name,
        base=find_base_model(result.source, read_optional_json(result.source / "config.json")),
        layout=result.layout,
        nbytes=result.num_bytes,
        command=command,
        versions={name: package_version(name) for name in LIBRARIES},
        bits_per_part=result.bits_per_part,
        quantized=result.quantized,
        skipped_modules=result.skipped_modules,
        unused_tensors=result.unused_tensors,
        num_tensors=result.num_tensors,
        quality=result.quality,
        output_check=result.output_check,
        adapter=None if adapter is None else adapter.resolve().name,
    )


def count_quantizations(quantized: Mapping[str, Quantization]) -> list[dict[str, Any]]:
    """Count modules by their quantization."""
    distinct = sorted(set(quantized.values()), key=lambda q: (q.bits, q.group_size, q.mode))
    return [
        {**asdict(q), "modules": sum(other == q for other in quantized.values())} for q in distinct
    ]


def calibration_report(calibration: Calibration) -> dict[str, Any]:
    """Summarize a calibration as plain values."""
    chosen = sorted(calibration.allocation.chosen.values(), key=lambda unit: -unit.kl)
    most_sensitive = [
        {
            "module": unit.modules[0],
            "bits": unit.quantization.bits,
            "group_size": unit.quantization.group_size,
            "kl": unit.kl,
        }
        for unit in chosen[:REPORTED_UNITS]
    ]
    return {
        "samples": calibration.num_samples,
        "bits_per_weight": round(calibration.allocation.bits_per_weight, 3),
        "expected_kl": round(calibration.allocation.expected_kl, DIGITS),
        "most_sensitive": most_sensitive,
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def default_target_name(source: Path, suffix: str) -> str:
    """Name a target the way the hub does: InternVL3-2B-4bit."""
    return f"{find_base_model(source, {}).rsplit('/', maxsplit=1)[-1]}-{suffix}"
