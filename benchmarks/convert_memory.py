"""Convert a checkpoint of several gigabytes, sparse on disk, with internvl3-mlx and with mlx-vlm.

    python -m benchmarks.convert_memory [--layers 6] [--mode affine] [--folder DIR]

Prints peak resident memory and seconds per gigabyte of source for both, from one run. The tensors
are zeros that take no room on disk, so that what is measured is the converter and not the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mlx.utils import tree_flatten

from benchmarks.checkpoint import Shape, config
from benchmarks.vocabulary import QWEN_MERGES, write_tokenizer
from internvl3_mlx.checkpoints.reader import INDEX
from internvl3_mlx.checkpoints.remap import PATCH_WEIGHT
from internvl3_mlx.checkpoints.writer import (
    SHARD_BYTES,
    TensorSpec,
    assign_shards,
    header_bytes,
    shard_name,
)
from internvl3_mlx.config import parse_config
from internvl3_mlx.models.internvl import InternVL

GB = 1e9
SPARE_BYTES = 300e6  # the limit is twice the largest tensor and this much
PEER = ("-m", "mlx_vlm", "convert")
OURS = ("-m", "internvl3_mlx", "convert")


@dataclass(frozen=True)
class ConverterRun:
    """One conversion in its own process."""

    name: str
    seconds: float
    peak_bytes: float
    code: int
    last_line: str


def main() -> None:
    """Write the checkpoint, run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers, 0.37 GB each")
    parser.add_argument("--width", type=int, default=3584, help="the decoder's; 3584 is the 8B's")
    parser.add_argument("--mode", default="affine")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        shape = Shape(
            vision_width=1024,
            vision_layers=24,
            text_width=options.width,
            text_layers=options.layers,
            merges=QWEN_MERGES,
        )
        entries = write_sparse(place / "source", shape)
        total, largest = sum(e.nbytes for e in entries), max(e.nbytes for e in entries)
        print(f"source {total / GB:.2f} GB, largest tensor {largest / GB:.2f} GB, {options.mode}")
        flags = ["--hf-path", str(place / "source"), "-q", "--q-mode", options.mode]
        runs = []
        for label, command, extra in (
            ("internvl3-mlx", OURS, ["--no-verify", "--quiet"]),
            ("mlx-vlm", PEER, []),
        ):
            target = place / label
            arguments = [*command, *flags, *extra, "--mlx-path", str(target)]
            runs.append(run_converter(label, arguments))
            shutil.rmtree(target, ignore_errors=True)
        print_report(runs, total, largest)


def write_sparse(folder: Path, shape: Shape) -> list[TensorSpec]:
    """Write every file of a 16-bit checkpoint, the tensors as sparse holes."""
    folder.mkdir(parents=True)
    content = config(shape, write_tokenizer(folder, shape.merges))
    content["torch_dtype"] = content["llm_config"]["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    model = InternVL(parse_config(content), image_id=0)
    entries = [
        TensorSpec(name, "BF16", published_shape(name, x.shape)) for name, x in model_tensors(model)
    ]
    shards = assign_shards(entries, SHARD_BYTES)
    table = {}
    for number, shard in enumerate(shards):
        name = shard_name(number, len(shards))
        header = header_bytes(shard, {"format": "pt"})
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(entry.nbytes for entry in shard))
        table |= {entry.name: name for entry in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}), encoding="utf-8")
    return entries


def model_tensors(model: InternVL) -> list[tuple[str, object]]:
    return tree_flatten(model.parameters())


def published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in PyTorch's order of the axes, which only the patch weight changes."""
    return (shape[0], shape[3], shape[1], shape[2]) if name == PATCH_WEIGHT else shape


def run_converter(name: str, arguments: list[str]) -> ConverterRun:
    """Run a Python command; read its peak resident memory from the kernel when it ends."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    output = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    lines = [line for line in output.splitlines() if line.strip()]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    seconds = time.perf_counter() - started
    return ConverterRun(
        name, seconds, usage.ru_maxrss * unit, child.returncode, (lines or [""])[-1]
    )


def print_report(runs: list[ConverterRun], total: float, largest: float) -> None:
    print("| converter | peak resident | seconds | seconds per GB |")
    print("|---|---|---|---|")
    for run in runs:
        failed = f" failed: {run.last_line}" if run.code else ""
        print(
            f"| {run.name}{failed} | {run.peak_bytes / GB:.2f} GB | {run.seconds:.1f} "
            f"| {run.seconds / (total / GB):.2f} |"
        )
    limit = 2 * largest + SPARE_BYTES
    verdict = "met" if runs[0].peak_bytes < limit else "EXCEEDED"
    print(f"limit {limit / GB:.2f} GB: {verdict}")


if __name__ == "__main__":
    main()
