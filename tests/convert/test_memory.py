"""Memory use of a conversion does not grow with the model."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from benchmarks.checkpoint import Shape
from benchmarks.convert_memory import write_sparse
from internvl3_mlx.checkpoints.reader import open_checkpoint

MB = 1_000_000
GROWTH = 120 * MB  # beyond what Python and MLX take by themselves
CODE = """
import resource, sys
from pathlib import Path
from internvl3_mlx.convert.pipeline import ConvertOptions, convert_checkpoint
from internvl3_mlx.convert.recipes import uniform_recipe
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
before = peak()
recipe = None if kind in ("hf", "fuse") else uniform_recipe(mode=kind)
adapter = Path(sys.argv[4]) if kind == "fuse" else None
layout = "hf" if kind == "hf" else "mlx"
for _ in convert_checkpoint(source, target, recipe, ConvertOptions(layout=layout, adapter=adapter)):
    pass
print(peak() - before)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of 0.5 GB, its largest tensor 0.2 GB, of holes that take no room on disk."""
    folder = tmp_path_factory.mktemp("large") / "source"
    shape = Shape(vision_width=64, vision_layers=1, text_width=1024, text_layers=1, merges=100_000)
    entries = write_sparse(folder, shape)
    assert max(entry.nbytes for entry in entries) > 200 * MB
    return folder


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory):
    """A DoRA adapter of the largest tensor, the head."""
    folder = tmp_path_factory.mktemp("adapter")
    head = open_checkpoint(source).tensors["language_model.lm_head.weight"]
    rows, columns = head.shape
    module = "base_model.model.language_model.lm_head"
    factors = {
        f"{module}.lora_A.weight": mx.ones((4, columns)),
        f"{module}.lora_B.weight": mx.ones((rows, 4)),
        f"{module}.lora_magnitude_vector": mx.ones(rows),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), factors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["affine", "mxfp8", "hf", "fuse"])
def test_peak_memory_stays_below_the_largest_tensor(source, adapter, tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(source), str(tmp_path / "out"), kind, str(adapter)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < GROWTH
