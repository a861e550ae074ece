"""What packing costs the demo model: accuracy and KL by bits, for plain, mixed and calibrated
recipes, in one table.

    python -m benchmarks.quantization_table [--model FOLDER] [--items 20] [--samples 384]

Pictures to learn from, to measure KL on and to ask about are held-out scenes of different seeds.
Packed numbers are unpacked before they are run: the same numbers, quicker on a CPU.
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
from internvl3_mlx.convert.calibration.awq import smooth
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
    mixed_recipe,
    uniform_recipe,
)
from internvl3_mlx.loading.resolve import DEMO_FOLDER

LEARN_SEED, MEASURE_SEED, ASK_SEED = 101, 102, 0  # columns of the held-out scenes; 0 is "square"
ANSWER_TOKENS = 12
MEASURED = 8  # questions a task to measure KL on
SOME = 24  # samples that decide the bits

Tensors = Mapping[str, mx.array]


@dataclass(frozen=True)
class QuantizationResult:
    """One line of the table."""

    name: str
    bits: float
    nbytes: int
    accuracy: float
    figures: QualityMetrics


@dataclass(frozen=True)
class QuantizationBenchmark:
    """The model and everything it is asked."""

    source: Path
    place: Path
    learning: list[CalibrationSample]
    measuring: list[CalibrationSample]
    wanted: list[mx.array]
    asked: list[tuple[CalibrationSample, str]]

    def row(
        self, name: str, packing: QuantizationRecipe | None, learned: Tensors | None = None
    ) -> QuantizationResult:
        """Convert, unpack, measure, ask."""
        target = self.place / re.sub(r"\W+", "-", name)
        for _ in convert_checkpoint(
            self.source, target, packing, ConvertOptions(calibrated_weights=learned or {})
        ):
            pass
        dense = target
        if packing is not None:
            dense = target.with_name(target.name + "-dense")
            for _ in convert_checkpoint(target, dense, None, ConvertOptions(dequantize=True)):
                pass
        opened = build_model(dense)
        figures = compute_metrics(opened.model, self.measuring, self.wanted)
        nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        bits = bits_per_part(target)["language model"]
        row = QuantizationResult(name, bits, nbytes, accuracy(opened, self.asked), figures)
        print(line(row), flush=True)
        return row


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--items", type=int, default=20, help="questions a task, for accuracy")
    parser.add_argument("--samples", type=int, default=384, help="questions to learn from")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="write the rows as JSON too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = prepare_benchmark(options, Path(name))
        print("| recipe | bits per weight | size | accuracy | KL | top-1 |")
        print("|---|---|---|---|---|---|")
        rows = [row for name in options.rows for row in ROWS[name](bench)]
    if options.out:
        table = [vars(row) | {"figures": row.figures.to_dict()} for row in rows]
        options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def prepare_benchmark(options: argparse.Namespace, place: Path) -> QuantizationBenchmark:
    """Draw the pictures and let the 16-bit model answer them once."""
    opened = build_model(options.model)
    per_task = max(options.samples // len(options.tasks), 1)
    learning = scenes(opened, place / "learn", LEARN_SEED, options.tasks, per_task)
    measuring = scenes(opened, place / "measure", MEASURE_SEED, options.tasks, MEASURED)
    asked = [
        (asked_sample(opened, place, item), item.question.answer)
        for task in options.tasks
        for item in items(task, Column(ASK_SEED), options.items)
    ]
    wanted = reference_log_probs(opened.model, measuring)
    return QuantizationBenchmark(options.model, place, learning, measuring, wanted, asked)


def scenes(
    opened: LoadedModel, folder: Path, seed: int, tasks: Sequence[str], number: int
) -> list[CalibrationSample]:
    folder.mkdir()
    sizes = ((112, 112), (180, 240), (256, 144))  # of pictures, in turn by task
    lines = []
    for at, task in enumerate(tasks):
        column = Column(seed, size=sizes[at % len(sizes)])
        for count, item in enumerate(items(task, column, number)):
            name = f"{task}-{count}.png"
            item.picture.save(folder / name)
            lines.append(json.dumps({"image": name, "question": item.question.text}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_samples(folder, opened)


def asked_sample(opened: LoadedModel, place: Path, item: Item) -> CalibrationSample:
    path = place / "asked.png"
    item.picture.save(path)
    return build_sample(opened, path, item.question.text)


def accuracy(opened: LoadedModel, asked: Sequence[tuple[CalibrationSample, str]]) -> float:
    """Give the share of questions answered right to the letter."""
    right = 0
    for sample, answer in asked:
        said = opened.tokenizer.decode(greedy_answer(opened, sample, ANSWER_TOKENS))
        right += said.strip() == answer
    return right / len(asked)


def plain_rows(bench: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    yield bench.row("16-bit", None)
    for bits in (2, 3, 4, 5, 6, 8):
        yield bench.row(f"plain {bits}-bit, groups of 64", uniform_recipe(bits))
    yield bench.row("plain 4-bit, groups of 32", uniform_recipe(4, 32))
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield bench.row(mode, uniform_recipe(mode=mode))
    for name in MIXED_RECIPES:
        yield bench.row(name, mixed_recipe(name))


def calibrated_rows(bench: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    """Calibrate as ``internvl3 convert`` does, at several sizes."""
    measured, sizes = sensitivity(bench, scale=False)
    for name, target, how in CALIBRATED:
        bits = allocate_bits(measured, sizes, target).to_recipe(name)
        yield bench.row(name, bits, taught(bench, bits, how))


def other_rows(bench: QuantizationBenchmark) -> Iterator[QuantizationResult]:
    """Show what each way brings by itself, and what was tried and left out."""
    plain = uniform_recipe(4)
    for words, how in ALONE:
        yield bench.row(f"plain 4-bit, {words}", plain, taught(bench, plain, how))
    measured, sizes = sensitivity(bench, scale=True)
    bits = allocate_bits(measured, sizes, 4.5).to_recipe("scaled")
    name = "calibrated 4.5, scaled by activations first"
    yield bench.row(name, bits, taught(bench, bits, CalibrationConfig(4.5, scale=True)))


ROWS: Mapping[str, Callable[[QuantizationBenchmark], Iterator[QuantizationResult]]] = {
    "plain": plain_rows,
    "calibrated": calibrated_rows,
    "others": other_rows,
}
ALONE = (
    ("rounded with feedback", CalibrationConfig(4.5)),
    ("scaled by activations", CalibrationConfig(4.5, scale=True, gptq=False)),
    ("scales learned", CalibrationConfig(4.5, epochs=1, gptq=False)),
)
CALIBRATED = (  # name, bits per weight, what is done
    ("**calibrated 4.5**", 4.5, CalibrationConfig(4.5)),
    ("bits allotted only, 4.5", 4.5, CalibrationConfig(4.5, gptq=False)),
    ("**calibrated 3.5**", 3.5, CalibrationConfig(3.5)),
    ("**calibrated 5.5**", 5.5, CalibrationConfig(5.5)),
    ("calibrated 4.5, then scales learned", 4.5, CalibrationConfig(4.5, epochs=1)),
)


def sensitivity(
    bench: QuantizationBenchmark, scale: bool
) -> tuple[list[Sensitivity], dict[str, int]]:
    opened, some = build_model(bench.source), bench.learning[:: len(bench.learning) // SOME]
    if scale:
        list(smooth(opened.model, some))
    measured = list(measure_sensitivities(opened.model, some))
    paths = {path for entry in measured for path in entry.modules}
    return measured, {path: get_module(opened.model, path).weight.size for path in paths}


def taught(
    bench: QuantizationBenchmark, packing: QuantizationRecipe, how: CalibrationConfig
) -> Tensors:
    """Make the tensors of a recipe as ``internvl3 convert --calibrate`` makes them."""
    opened, some = build_model(bench.source), bench.learning[:: len(bench.learning) // SOME]
    if how.scale:
        list(smooth(opened.model, some))
    depth = opened.config.text.num_hidden_layers
    forms = {
        path: form
        for path in packable_paths(opened)
        if (form := packing.with_num_layers(depth).choose(path)) is not None
    }
    return quantize_calibrated(opened, bench.learning, forms, how, lambda *_: None)


def packable_paths(opened: LoadedModel) -> Iterator[str]:
    """List the linears and embeddings of projector and language model."""
    for path, module in opened.model.named_modules():
        dense = hasattr(module, "to_quantized") and not path.startswith("vision_model.")
        if dense:
            yield path


def line(row: QuantizationResult) -> str:
    figures = row.figures
    return (
        f"| {row.name} | {row.bits:.2f} | {row.nbytes / 1e6:.2f} MB | {row.accuracy:.1%} "
        f"| {figures.kl:.5f} | {figures.top1:.1%} |"
    )


if __name__ == "__main__":
    main()
