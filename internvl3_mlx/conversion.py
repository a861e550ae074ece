"""``convert_model``: everything that ``internvl3 convert`` does, as one typed function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT
from internvl3_mlx.checkpoints.reader import open_checkpoint, parameters_by_part
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import read_config
from internvl3_mlx.convert.api import (
    Conversion,
    ConversionProgress,
    ConversionResult,
    default_target_name,
)
from internvl3_mlx.convert.calibration.calibrate import TARGET_BPW, CalibrationConfig
from internvl3_mlx.convert.pipeline import ConvertOptions
from internvl3_mlx.convert.recipes import (
    QuantizationRecipe,
    mixed_recipe,
    read_recipe,
    uniform_recipe,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import OnWait
from internvl3_mlx.loading import hub
from internvl3_mlx.loading.fetch_adapter import fetch_adapter
from internvl3_mlx.loading.resolve import resolve_model
from internvl3_mlx.user_paths import expand_user

Layout = Literal["mlx", "original", "hf"]
Part = Literal["all", "language"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Dtype = Literal["float32", "float16", "bfloat16"]
OnProgress = Callable[[ConversionProgress], None]

PARTS = ("all", "language")
DEFAULT_BITS, SMALL_MODEL_BITS = 4, 6
SMALL_MODEL_PARAMETERS = 3e8  # of the language model, embedding and head included
YAML_SUFFIXES = (".yaml", ".yml")
UNSHOWN = ("command", "on_progress", "overwrite")  # say nothing about what was written


def convert_model(
    source: str | Path,
    target: str | Path | None = None,
    *,
    layout: Layout = "mlx",
    part: Part = "all",
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode | None = None,
    vision_bits: int | None = None,
    recipe: str | Path | QuantizationRecipe | None = None,
    calibration_images: str | Path | None = None,
    target_bpw: float | None = None,
    gptq: bool = True,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    adapter: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    measure: bool = False,
    measure_images: str | Path | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
) -> ConversionResult:
    """Convert a checkpoint of any layout, and quantize, dequantize or merge an adapter on the way.

    Without ``bits``, ``group_size``, ``mode``, ``vision_bits``, ``recipe`` or
    ``calibration_images`` the weights are copied as they are. Memory use stays small, whatever the
    size of the model, unless ``calibration_images`` or ``measure`` need the model itself. The
    target folder appears once it is complete and verified.

    Args:
        source: A folder, a repository ``OWNER/NAME`` or a size such as ``"2b"``.
        target: The folder to write. By default it is named after the model and what is done to it,
            in the current directory.
        layout: ``"mlx"``, or ``"original"`` or ``"hf"`` for PyTorch.
        part: ``"language"`` writes the language model alone, as a folder that mlx-lm reads.
        bits: Bits of the language model: 2, 3, 4, 5, 6 or 8. By default 4 when quantizing, or 6 for
            a language model of fewer than 0.3 billion parameters.
        group_size: Weights that share a scale: 32, 64 or 128; 64 by default.
        mode: MLX's quantization mode; ``"affine"`` by default.
        vision_bits: Bits of the vision tower, which is not quantized by default. With
            ``calibration_images``, the fewest bits it may get.
        recipe: A mixed recipe such as ``"mixed_4_6"``, or a YAML file.
        calibration_images: A folder of images; bits are allocated by measured sensitivity on them.
        target_bpw: Mean bits per weight for ``calibration_images``, scales included; 4.5 by
            default.
        gptq: Whether calibration rounds weights with GPTQ's error feedback.
        dtype: Data type of the weights that are not quantized; by default they keep theirs.
        dequantize: Whether to dequantize a quantized source.
        adapter: A PEFT adapter to merge into the weights: a folder or OWNER/NAME on the hub.
        overwrite: Whether to replace ``target`` if it exists.
        verify: Whether to compare source and target on one generated question before the target
            is kept.
        measure: Whether to compare source and target on ``measure_images`` afterwards.
        measure_images: A folder of images; by default ``calibration_images``, else our own.
        dry_run: Whether to only plan, from the headers of ``source``; nothing is written.
        revision: Branch, tag or commit of a repository.
        command: Shell command to name in the model card instead of this call.
        on_progress: Called with each step of the conversion.

    Raises:
        UserError: The arguments contradict each other, or do not fit ``source``.
        CheckpointError: ``source`` is damaged, or the target does not pass its checks.
    """
    call = describe_call(locals())
    quantizing = QuantizationArguments(
        bits=bits,
        group_size=group_size,
        mode=mode,
        vision_bits=vision_bits,
        recipe=recipe,
        calibration_images=expand(calibration_images),
        target_bpw=target_bpw,
        gptq=gptq,
    )
    quantizing.check(part, layout, measure=measure, dry_run=dry_run)
    folder = find_source(source, revision, quantize=quantizing.quantizes, on_progress=on_progress)
    quantizing = quantizing.with_default_bits(folder)
    conversion = Conversion(
        source=folder,
        target=expand(target) or Path(default_target_name(folder, quantizing.suffix(layout, part))),
        options=ConvertOptions(
            layout=layout if part == "all" else LANGUAGE_LAYOUT,
            dtype=dtype,
            dequantize=dequantize,
            overwrite=overwrite,
            check_output=verify,
            independent_check=measure,
            adapter=None if adapter is None else fetch_adapter(str(adapter)),
            on_wait=wait_notifier(on_progress),
        ),
        recipe=quantizing.choose_recipe(),
        calibration=quantizing.choose_calibration(dtype),
        measure=measure,
        measure_images=expand(measure_images) or quantizing.calibration_images,
        command=command or call,
    )
    return conversion.plan() if dry_run else finish(conversion, on_progress)


@dataclass(frozen=True, kw_only=True)
class QuantizationArguments:
    """The arguments of ``convert_model`` that say how many bits each module gets."""

    bits: int | None
    group_size: int | None
    mode: str | None
    vision_bits: int | None
    recipe: str | Path | QuantizationRecipe | None
    calibration_images: Path | None
    target_bpw: float | None
    gptq: bool

    def check(self, part: str, layout: str, *, measure: bool, dry_run: bool) -> None:
        """Refuse a contradiction before anything is opened or downloaded."""
        check_part(part, layout, vision_bits=self.vision_bits, measure=measure)
        calibrates = self.calibration_images is not None
        if self.recipe is not None and calibrates:
            raise UserError("a recipe and calibration both choose the bits; give only one of them")
        if self.recipe is not None and (self.bits is not None or self.mode is not None):
            raise UserError("a recipe chooses the bits; drop bits and mode, or the recipe")
        if calibrates and (self.bits, self.group_size, self.mode) != (None, None, None):
            raise UserError(
                "calibration chooses bits and group sizes itself; drop bits, group size and mode, "
                "and set the target bits per weight instead (--target-bpw)"
            )
        if self.target_bpw is not None and not calibrates:
            raise UserError(
                "target bits per weight were given without calibration; "
                "add a folder of calibration images (--calibrate)"
            )
        if dry_run and calibrates:
            raise UserError(
                "a dry run reads only headers and cannot calibrate; drop one of the two"
            )
        self.choose_recipe()  # checks the bits and reads a recipe file

    @property
    def quantizes(self) -> bool:
        values = (self.bits, self.group_size, self.mode, self.vision_bits, self.recipe)
        return self.calibration_images is not None or any(value is not None for value in values)

    def with_default_bits(self, folder: Path) -> "QuantizationArguments":
        """Fill in the bits where none were given: few for most models, more for small language
        models, which few bits ruin."""
        free = self.bits is None and self.recipe is None and self.calibration_images is None
        if not self.quantizes or not free or self.mode not in (None, "affine"):
            return self
        return replace(self, bits=default_bits(folder))

    def choose_recipe(self) -> QuantizationRecipe | None:
        """Build the recipe; None when nothing is quantized or calibration makes the recipe."""
        if not self.quantizes or self.calibration_images is not None:
            return None
        if self.recipe is None:
            return uniform_recipe(
                self.bits, self.group_size, self.mode or "affine", vision_bits=self.vision_bits
            )
        if isinstance(self.recipe, QuantizationRecipe):
            return self.recipe
        if Path(self.recipe).suffix in YAML_SUFFIXES:
            return read_recipe(expand_user(self.recipe))
        return mixed_recipe(str(self.recipe), self.group_size, vision_bits=self.vision_bits)

    def choose_calibration(self, dtype: str | None) -> CalibrationConfig | None:
        if self.calibration_images is None:
            return None
        return CalibrationConfig(
            images=self.calibration_images,
            target_bpw=self.target_bpw or TARGET_BPW,
            vision_bits=self.vision_bits,
            gptq=self.gptq,
            dtype=dtype,
        )

    def suffix(self, layout: str, part: str) -> str:
        """Name what is done, for a target that was given no name: 4bit, 4.5bpw, hf or language."""
        if self.calibration_images is not None:
            name = f"{self.target_bpw or TARGET_BPW:g}bpw"
        else:
            recipe = self.choose_recipe()
            name = "" if recipe is None else recipe.name
        if part == "all":
            return name or layout
        return f"{part}-{name}" if name else part


def check_part(part: str, layout: str, *, vision_bits: int | None, measure: bool) -> None:
    """Raise UserError for an unknown part, and for what the language model alone does not have."""
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    if part == "all":
        return
    unfit = {
        f"it is written in the mlx layout, not as {layout} (--to)": layout != "mlx",
        "it has no vision encoder to quantize (--q-vision)": vision_bits is not None,
        "it cannot be measured on images (--measure)": measure,
    }
    for reason, found in unfit.items():
        if found:
            raise UserError(f"--part asks for the language model alone, but {reason}; drop one")


def default_bits(folder: Path) -> int:
    """Return the bits to quantize a model to: ``DEFAULT_BITS``, or more for a small decoder."""
    checkpoint = open_checkpoint(folder)
    config, _ = plan_remap(checkpoint, read_config(folder))
    parameters = parameters_by_part(checkpoint, config)["language_model"].parameters
    return SMALL_MODEL_BITS if parameters < SMALL_MODEL_PARAMETERS else DEFAULT_BITS


def find_source(
    source: str | Path,
    revision: str | None = None,
    *,
    quantize: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Find the source's folder, or download it. It must fit on the disk but not in memory, since
    a conversion does not load the model."""
    location = resolve_model(str(source))
    if location.folder is not None:
        return location.folder
    assert location.repo is not None
    if folder := hub.cached_snapshot(location.repo, revision):
        return folder
    repo = hub.repo_info(location.repo, revision)
    hub.check_free_disk(repo, quantized=quantize)
    notify = on_progress or ignore_progress
    notify(ConversionProgress("download", f"downloading {location.repo}", total=repo.nbytes))
    return hub.download(repo, revision)


def wait_notifier(on_progress: OnProgress | None) -> OnWait:
    """Return what tells of another process that is waited for."""
    notify = on_progress or ignore_progress
    return lambda message: notify(ConversionProgress("wait", message))


def finish(conversion: Conversion, on_progress: OnProgress | None) -> ConversionResult:
    """Run a conversion to its end and return the result."""
    notify, steps = on_progress or ignore_progress, conversion.run()
    while True:
        try:
            notify(next(steps))
        except StopIteration as end:
            result: ConversionResult = end.value
            return result


def ignore_progress(_: ConversionProgress) -> None:
    """Show nothing."""


def expand(path: str | Path | None) -> Path | None:
    return None if path is None else expand_user(path)


def describe_call(arguments: Mapping[str, Any]) -> str:
    """Write the call of ``convert_model`` for the model card, which may be published: arguments
    that are not the default, and only the names of local folders."""
    shown = []
    for name, parameter in signature(convert_model).parameters.items():
        value = arguments[name]
        if name in UNSHOWN or value == parameter.default:
            continue
        if isinstance(value, QuantizationRecipe):
            value = value.name
        path = expand_user(value) if isinstance(value, (str, Path)) else None
        if path is not None and path.is_absolute():
            value = path.name
        text = repr(str(value) if isinstance(value, Path) else value)
        shown.append(text if name in ("source", "target") else f"{name}={text}")
    return f"convert_model({', '.join(shown)})"
