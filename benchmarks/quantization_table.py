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
from internvl3_mlx.checkpoints.build_model import Opened, open_model
from internvl3_mlx.convert.calibration.awq import smooth
from internvl3_mlx.convert.calibration.bit_allocation import (
    Measured,
    allocate,
    module_at,
    sensitivities,
)
from internvl3_mlx.convert.calibration.calibrate import Wish, teach
from internvl3_mlx.convert.calibration.data import Sample, continuation, prepared, read_samples
from internvl3_mlx.convert.calibration.metrics import Figures, bits_by_part, compare, reference
from internvl3_mlx.convert.pipeline import Options, convert
from internvl3_mlx.convert.recipes import MIXES, Recipe, mixed, recipe
from internvl3_mlx.loading.resolve import DEMO_FOLDER

LEARN_SEED, MEASURE_SEED, ASK_SEED = 101, 102, 0  # columns of the held-out scenes; 0 is "square"
ANSWER_TOKENS = 12
MEASURED = 8  # questions a task to measure KL on
SOME = 24  # samples that decide the bits

Tensors = Mapping[str, mx.array]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    bits: float
    nbytes: int
    accuracy: float
    figures: Figures


@dataclass(frozen=True)
class Bench:
    """The model and everything it is asked."""

    source: Path
    place: Path
    learning: list[Sample]
    measuring: list[Sample]
    wanted: list[mx.array]
    asked: list[tuple[Sample, str]]

    def row(self, name: str, packing: Recipe | None, learned: Tensors | None = None) -> Row:
        """Convert, unpack, measure, ask."""
        target = self.place / re.sub(r"\W+", "-", name)
        for _ in convert(self.source, target, packing, Options(learned=learned or {})):
            pass
        dense = target
        if packing is not None:
            dense = target.with_name(target.name + "-dense")
            for _ in convert(target, dense, None, Options(dequantize=True)):
                pass
        opened = open_model(dense)
        figures = compare(opened.model, self.measuring, self.wanted)
        nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        bits = bits_by_part(target)["language model"]
        row = Row(name, bits, nbytes, accuracy(opened, self.asked), figures)
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
        bench = prepare(options, Path(name))
        print("| recipe | bits per weight | size | accuracy | KL | top-1 |")
        print("|---|---|---|---|---|---|")
        rows = [row for name in options.rows for row in ROWS[name](bench)]
    if options.out:
        table = [vars(row) | {"figures": row.figures.to_dict()} for row in rows]
        options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def prepare(options: argparse.Namespace, place: Path) -> Bench:
    """Draw the pictures and let the 16-bit model answer them once."""
    opened = open_model(options.model)
    per_task = max(options.samples // len(options.tasks), 1)
    learning = scenes(opened, place / "learn", LEARN_SEED, options.tasks, per_task)
    measuring = scenes(opened, place / "measure", MEASURE_SEED, options.tasks, MEASURED)
    asked = [
        (asked_sample(opened, place, item), item.question.answer)
        for task in options.tasks
        for item in items(task, Column(ASK_SEED), options.items)
    ]
    wanted = reference(opened.model, measuring)
    return Bench(options.model, place, learning, measuring, wanted, asked)


def scenes(
    opened: Opened, folder: Path, seed: int, tasks: Sequence[str], number: int
) -> list[Sample]:
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
    return read_samples(folder, opened)


def asked_sample(opened: Opened, place: Path, item: Item) -> Sample:
    path = place / "asked.png"
    item.picture.save(path)
    return prepared(opened, path, item.question.text)


def accuracy(opened: Opened, asked: Sequence[tuple[Sample, str]]) -> float:
    """Give the share of questions answered right to the letter."""
    right = 0
    for sample, answer in asked:
        said = opened.tokenizer.decode(continuation(opened, sample, ANSWER_TOKENS))
        right += said.strip() == answer
    return right / len(asked)


def plain_rows(bench: Bench) -> Iterator[Row]:
    yield bench.row("16-bit", None)
    for bits in (2, 3, 4, 5, 6, 8):
        yield bench.row(f"plain {bits}-bit, groups of 64", recipe(bits))
    yield bench.row("plain 4-bit, groups of 32", recipe(4, 32))
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield bench.row(mode, recipe(mode=mode))
    for name in MIXES:
        yield bench.row(name, mixed(name))


def calibrated_rows(bench: Bench) -> Iterator[Row]:
    """Calibrate as ``internvl3 convert`` does, at several sizes."""
    measured, sizes = sensitivity(bench, scale=False)
    for name, target, how in CALIBRATED:
        bits = allocate(measured, sizes, target).recipe(name)
        yield bench.row(name, bits, taught(bench, bits, how))


def other_rows(bench: Bench) -> Iterator[Row]:
    """Show what each way brings by itself, and what was tried and left out."""
    plain = recipe(4)
    for words, how in ALONE:
        yield bench.row(f"plain 4-bit, {words}", plain, taught(bench, plain, how))
    measured, sizes = sensitivity(bench, scale=True)
    bits = allocate(measured, sizes, 4.5).recipe("scaled")
    name = "calibrated 4.5, scaled by activations first"
    yield bench.row(name, bits, taught(bench, bits, Wish(4.5, scale=True)))


ROWS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "plain": plain_rows,
    "calibrated": calibrated_rows,
    "others": other_rows,
}
ALONE = (
    ("rounded with feedback", Wish(4.5)),
    ("scaled by activations", Wish(4.5, scale=True, feedback=False)),
    ("scales learned", Wish(4.5, epochs=1, feedback=False)),
)
CALIBRATED = (  # name, bits per weight, what is done
    ("**calibrated 4.5**", 4.5, Wish(4.5)),
    ("bits allotted only, 4.5", 4.5, Wish(4.5, feedback=False)),
    ("**calibrated 3.5**", 3.5, Wish(3.5)),
    ("**calibrated 5.5**", 5.5, Wish(5.5)),
    ("calibrated 4.5, then scales learned", 4.5, Wish(4.5, epochs=1)),
)


def sensitivity(bench: Bench, scale: bool) -> tuple[list[Measured], dict[str, int]]:
    opened, some = open_model(bench.source), bench.learning[:: len(bench.learning) // SOME]
    if scale:
        list(smooth(opened.model, some))
    measured = list(sensitivities(opened.model, some))
    paths = {path for entry in measured for path in entry.modules}
    return measured, {path: module_at(opened.model, path).weight.size for path in paths}


def taught(bench: Bench, packing: Recipe, how: Wish) -> Tensors:
    """Make the tensors of a recipe as ``internvl3 convert --calibrate`` makes them."""
    opened, some = open_model(bench.source), bench.learning[:: len(bench.learning) // SOME]
    if how.scale:
        list(smooth(opened.model, some))
    depth = opened.config.text.num_hidden_layers
    forms = {
        path: form
        for path in packable_paths(opened)
        if (form := packing.for_depth(depth).choose(path)) is not None
    }
    return teach(opened, bench.learning, forms, how, lambda *_: None)


def packable_paths(opened: Opened) -> Iterator[str]:
    """List the linears and embeddings of projector and language model."""
    for path, module in opened.model.named_modules():
        dense = hasattr(module, "to_quantized") and not path.startswith("vision_model.")
        if dense:
            yield path


def line(row: Row) -> str:
    figures = row.figures
    return (
        f"| {row.name} | {row.bits:.2f} | {row.nbytes / 1e6:.2f} MB | {row.accuracy:.1%} "
        f"| {figures.kl:.5f} | {figures.top1:.1%} |"
    )


if __name__ == "__main__":
    main()
