"""What quantization costs the demo model: accuracy and KL divergence of plain, mixed and calibrated
recipes, in one table.

    python -m benchmarks.quantization_table [--model FOLDER] [--items 20] [--samples 384]

The images to calibrate on, to measure KL on and to ask about are held-out scenes of different
seeds. Quantized checkpoints are dequantized before they run: the same values, faster on a CPU.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from examples.demo_model.heldout import TASKS, Column, Item, items
from internvl3_mlx.checkpoints.build_model import LoadedModel, build_model
from internvl3_mlx.convert.calibration.bit_allocation import (
    Sensitivity,
    allocate_bits,
    get_module,
    measure_sensitivities,
)
from internvl3_mlx.convert.calibration.calibrate import CalibrationConfig, quantize_calibrated
from internvl3_mlx.convert.calibration.data import (
    CalibrationSample,
    build_sample,
    greedy_answer,
    load_samples,
)
from internvl3_mlx.convert.calibration.metrics import (
    QualityMetrics,
    bits_per_part,
    compute_metrics,
    reference_log_probs,
)
from internvl3_mlx.convert.pipeline import ConvertOptions, convert_checkpoint
from internvl3_mlx.convert.recipes import (
    MIXED_RECIPES,
    QuantizationRecipe,
    make_quantization,
    mixed_recipe,
    uniform_recipe,
)
from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.records.json_values import write_json

# of the held-out scenes; 0 is the column "square"
CALIBRATION_SEED, MEASURE_SEED, ASK_SEED = 101, 102, 0
ANSWER_TOKENS = 12
KL_QUESTIONS = 8  # questions per task to measure KL on
SENSITIVITY_SAMPLES = 24  # enough to decide the bits

Tensors = Mapping[str, mx.array]


@dataclass(frozen=True)
class QuantizationResult:
    """One line of the table."""

    name: str
    bits: float
    nbytes: int
    accuracy: float
    metrics: QualityMetrics


@dataclass(frozen=True)
class QuantizationBenchmark:
    """The model and all questions it is asked."""

    source: Path
    work_dir: Path
    calibration: list[CalibrationSample]
    measuring: list[CalibrationSample]
    reference: list[mx.array]
    questions: list[tuple[CalibrationSample, str]]

    def row(
        self,
        name: str,
        quantization_recipe: QuantizationRecipe | None,
        weights: Tensors | None = None,
    ) -> QuantizationResult:
        """Convert, dequantize, measure, and ask every question."""
        target = self.work_dir / re.sub(r"\W+", "-", name)
        for _ in convert_checkpoint(
            self.source,
            target,
            quantization_recipe,
            ConvertOptions(calibrated_weights=weights or {}),
        ):
            pass
        dense = target
        if quantization_recipe is not None:
            dense = target.with_name(target.name + "-dense")
            for _ in convert_checkpoint(target, dense, None, ConvertOptions(dequantize=True)):
                pass
        loaded = build_model(dense)
        metrics = compute_metrics(loaded.model, self.measuring, self.reference)
        nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        bits = bits_per_part(target)["language model"]
        row = QuantizationResult(name, bits, nbytes, accuracy(loaded, self.questions), metrics)
        print(line(row), flush=True)
        return row


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--items", type=int, default=20, help="questions per task, for accuracy")
    parser.add_argument("--samples", type=int, default=384, help="questions to calibrate on")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="write the rows as JSON too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        benchmark = prepare_benchmark(options, Path(name))
        print("| recipe | bits per weight | size | accuracy | KL | top-1 |")
        print("|---|---|---|---|---|---|")
        rows = [row for name in options.rows for row in ROWS[name](benchmark)]
    if options.out:
        table = [vars(row) | {"metrics": row.metrics.to_dict()} for row in rows]
        write_json(options.out, table)


def prepare_benchmark(options: argparse.Namespace, work_dir: Path) -> QuantizationBenchmark:
    """Render the images and compute the 16-bit model's log-probabilities once."""
    loaded = build_model(options.model)
    per_task = max(options.samples // len(options.tasks), 1)
    calibration = write_scenes(
        loaded, work_dir / "calibrate", CALIBRATION_SEED, options.tasks, per_task
    )
    measuring = write_scenes(
        loaded, work_dir / "measure", MEASURE_SEED, options.tasks, KL_QUESTIONS
    )
    questions = [
        (question_sample(loaded, work_dir, item), item.question.answer)
        for task in options.tasks
        for item in items(task, Column(ASK_SEED), options.items)
    ]
    reference = reference_log_probs(loaded.model, measuring)
    return QuantizationBenchmark(
        options.model, work_dir, calibration, measuring, reference, questions
    )


def write_scenes(
    loaded: LoadedModel, folder: Path, seed: int, tasks: Sequence[str], number: int
) -> list[CalibrationSample]:
    """Render held-out scenes with their questions into a folder; return them as samples."""
    folder.mkdir()
    sizes = ((112, 112), (180, 240), (256, 144))  # of images, in turn by task
    lines = []
    for at, task in enumerate(tasks):
        column = Column(seed, size=sizes[at % len(sizes)])
        for count, item in enumerate(items(task, column, number)):
            name = f"{task}-{count}.png"
            item.picture.save(folder / name)
            lines.append(json.dumps({"image": name, "question": item.question.text}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_samples(folder, loaded)


def question_sample(loaded: LoadedModel, work_dir: Path, item: Item) -> CalibrationSample:
    path = work_dir / "question.png"
    item.picture.save(path)
    return build_sample(loaded, path, item.question.text)


def accuracy(loaded: LoadedModel, questions: Sequence[tuple[CalibrationSample, str]]) -> float:
    """Return the share of questions answered exactly right."""
    right = 0
    for sample, answer in questions:
        said = loaded.tokenizer.decode(greedy_answer(loaded, sample, ANSWER_TOKENS))
        right += said.strip() == answer
    return right / len(questions)


def plain_rows(benchmark: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    yield benchmark.row("16-bit", None)
    for bits in (2, 3, 4, 5, 6, 8):
        yield benchmark.row(f"plain {bits}-bit, groups of 64", uniform_recipe(bits))
    yield benchmark.row("plain 4-bit, groups of 32", uniform_recipe(4, 32))
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield benchmark.row(mode, uniform_recipe(mode=mode))
    for name in MIXED_RECIPES:
        yield benchmark.row(name, mixed_recipe(name))


def calibrated_rows(benchmark: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    """Calibrate as ``internvl3 convert`` does, at several sizes."""
    sensitivities, sizes = sensitivity(benchmark)
    for name, target_bpw, gptq in CALIBRATED:
        recipe = allocate_bits(sensitivities, sizes, target_bpw).to_recipe(name)
        yield benchmark.row(name, recipe, quantized_weights(benchmark, recipe, gptq=gptq))


def gptq_rows(benchmark: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    """Measure what GPTQ brings by itself."""
    plain = uniform_recipe(4)
    weights = quantized_weights(benchmark, plain, gptq=True)
    yield benchmark.row("plain 4-bit with GPTQ", plain, weights)


def vision_rows(benchmark: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    """Measure what fewer bits of the vision tower cost, the language model unquantized or at 4."""
    for bits in (8, 6, 4):
        tower = QuantizationRecipe(f"tower {bits}", None, None, make_quantization(bits))
        yield benchmark.row(f"tower {bits}-bit, the rest 16", tower)
    yield benchmark.row("plain 4-bit, tower 16", uniform_recipe(4))
    yield benchmark.row("plain 4-bit, tower 8", uniform_recipe(4, vision_bits=8))


ROWS: Mapping[str, Callable[[QuantizationBenchmark], Iterator[QuantizationResult]]] = {
    "plain": plain_rows,
    "calibrated": calibrated_rows,
    "gptq": gptq_rows,
    "vision": vision_rows,
}
CALIBRATED = (  # name, bits per weight, whether GPTQ rounds
    ("**calibrated 4.5**", 4.5, True),
    ("bit allocation only, 4.5", 4.5, False),
    ("**calibrated 3.5**", 3.5, True),
    ("**calibrated 5.5**", 5.5, True),
)


def sensitivity(benchmark: QuantizationBenchmark) -> tuple[list[Sensitivity], dict[str, int]]:
    """Measure the sensitivity of every unit; also return the number of weights of each module."""
    loaded = build_model(benchmark.source)
    some = benchmark.calibration[:: len(benchmark.calibration) // SENSITIVITY_SAMPLES]
    sensitivities = list(measure_sensitivities(loaded.model, some))
    paths = {path for entry in sensitivities for path in entry.modules}
    return sensitivities, {path: get_module(loaded.model, path).weight.size for path in paths}


def quantized_weights(
    benchmark: QuantizationBenchmark, recipe: QuantizationRecipe, *, gptq: bool
) -> Tensors:
    """Return the tensors of a recipe as ``internvl3 convert --calibrate`` computes them."""
    loaded = build_model(benchmark.source)
    choose = recipe.with_num_layers(loaded.config.text.num_hidden_layers).choose
    quantizations = {p: q for p in quantizable_paths(loaded) if (q := choose(p)) is not None}
    config = CalibrationConfig(images=benchmark.work_dir, gptq=gptq)
    steps = quantize_calibrated(loaded, benchmark.calibration, quantizations, config)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            weights: Tensors = end.value
            return weights


def quantizable_paths(loaded: LoadedModel) -> Iterator[str]:
    """List the linear layers and embeddings of the projector and the language model."""
    for path, module in loaded.model.named_modules():
        if hasattr(module, "to_quantized") and not path.startswith("vision_model."):
            yield path


def line(row: QuantizationResult) -> str:
    metrics = row.metrics
    return (
        f"| {row.name} | {row.bits:.2f} | {row.nbytes / 1e6:.2f} MB | {row.accuracy:.1%} "
        f"| {metrics.kl:.5f} | {metrics.top1:.1%} |"
    )


if __name__ == "__main__":
    main()
