"""A full fine-tune is exported as a checkpoint that loads, converts, and holds what was trained."""

import subprocess
import sys
from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import run_conversion, tensors
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import numbers, tiny
from fixtures.lora_models import adapted, logits
from fixtures.original_torch import torch_logits
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import TOLERANCE
from mlx.utils import tree_flatten, tree_map
from transformers import InternVLForConditionalGeneration

from internvl3_mlx import UserError, load
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.training.export import export_model
from internvl3_mlx.training.trainable import set_trainable

PARTS = ("vision_model", "mlp1", "language_model")


def trained(case, parts=PARTS):
    """A model of which some parts have moved, as training moves them."""
    model = load_local_model(case.folder, for_training=True).model
    set_trainable(model, parts)
    mx.random.seed(1)
    moved = tree_map(
        lambda x: x + 0.02 * mx.random.normal(x.shape).astype(x.dtype),
        model.trainable_parameters(),
    )
    model.update(moved)
    return model


def exported(model, source, target, **options):
    for _ in export_model(model, source, target, **options):
        pass
    return target


@pytest.mark.parametrize(
    ("style", "layout"), [("300m", "original"), ("6b", "hf_a"), ("9b", "original")]
)
def test_trained_weights_are_exported(style, layout, tmp_path):
    case = tiny(Recipe(style=style, layout=layout))
    model = trained(case)
    folder = exported(model, case.folder, tmp_path / "out")
    assert relative_error(logits(load(str(folder)).model, case), logits(model, case)) < TOLERANCE
    assert relative_error(logits(model, case), logits(load(str(case.folder)).model, case)) > 0.1
    for name, x in tree_flatten(model.parameters()):
        assert bool(mx.array_equal(tensors(folder)[name], x)), name


@pytest.mark.parametrize("to", ["hf", "original"])
def test_an_export_converts_to_pytorchs_layouts(to, tmp_path):
    case = tiny(Recipe(style="9b"))
    model = trained(case, ("language_model", "mlp1"))
    folder = exported(model, case.folder, tmp_path / "out")
    run_conversion(folder, tmp_path / "there", layout=to)
    there = logits(build_model(tmp_path / "there").model, case)
    assert relative_error(there, logits(model, case)) < TOLERANCE


def test_transformers_reads_a_converted_export(tmp_path):
    case = tiny(Recipe())
    model = trained(case)
    folder = exported(model, case.folder, tmp_path / "out")
    run_conversion(folder, tmp_path / "hf", layout="hf")
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    found = torch_logits(theirs, token_row(case, [2]), random_pixels(case, 2), native=True)
    assert relative_error(found, logits(model, case)) < TOLERANCE


def test_frozen_parts_keep_their_bytes_and_trained_ones_their_dtype(tmp_path):
    case = tiny(Recipe(dtype="bfloat16", shards=2))
    model = trained(case, ("mlp1",))
    after = tensors(exported(model, case.folder, tmp_path / "out"))
    before = tensors(case.folder)
    for name, x in after.items():
        assert x.dtype == mx.bfloat16, name
        if not name.startswith("mlp1") and "patch" not in name:
            assert bool(mx.array_equal(x, before[name])), name
    own = dict(tree_flatten(model.parameters()))["mlp1.1.weight"]
    assert relative_error(numbers(after["mlp1.1.weight"]), numbers(own)) < 2**-8


def test_an_unquantized_part_of_a_quantized_model_can_be_trained(tmp_path):
    bits = Bits(group_size=32, overrides={"mlp1.1": False, "mlp1.3": False})
    case = tiny(Recipe(layout="mlx", bits=bits))
    model = trained(case, ("mlp1",))
    folder = exported(model, case.folder, tmp_path / "out")
    assert relative_error(logits(load(str(folder)).model, case), logits(model, case)) < TOLERANCE


def test_adapters_are_merged_with_trained_parts(tmp_path):
    case = tiny(Recipe())
    model, _ = adapted(case, keys=("language", "vision"))
    set_trainable(model, ("lora", "mlp1"))
    model.mlp1[1].bias = model.mlp1[1].bias + 1
    folder = exported(model, case.folder, tmp_path / "out")
    assert relative_error(logits(load(str(folder)).model, case), logits(model, case)) < TOLERANCE


MLX_VLM = """
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_vlm.utils import load_model
out = load_model(Path(sys.argv[1]))(mx.array([[3, 4, 5, 6]]), pixel_values=None, mask=None)
np.save(sys.argv[2], np.array(out.logits.astype(mx.float32)))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
def test_mlx_vlm_reads_an_export(tmp_path):
    case = tiny(Recipe())
    model = trained(case)
    folder = exported(model, case.folder, tmp_path / "out")
    words = [sys.executable, "-c", MLX_VLM, str(folder), str(tmp_path / "theirs.npy")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = numbers(model(mx.array([[3, 4, 5, 6]])))
    assert relative_error(ours, np.load(tmp_path / "theirs.npy")) < TOLERANCE


def test_errors_are_reported_and_leave_nothing(tmp_path):
    case = tiny(Recipe())
    model = trained(case, ("mlp1",))
    model.mlp1[1].bias = model.mlp1[1].bias * mx.inf
    with pytest.raises(UserError, match=r"mlp1\.1\.bias holds NaN or infinity"):
        export_model(model, case.folder, tmp_path / "out")
    model.freeze()
    with pytest.raises(UserError, match="no part of the model was trained"):
        export_model(model, case.folder, tmp_path / "out")
    packed = tiny(Recipe(layout="mlx", bits=Bits(group_size=32)))
    over, _ = adapted(packed, keys=("q_proj",))
    with pytest.raises(
        UserError, match="has an adapter on quantized weights; save the adapter and fuse"
    ):
        export_model(over, packed.folder, tmp_path / "out")
    with pytest.raises(UserError, match="was trained unquantized but is quantized in"):
        export_model(trained(case, ("mlp1",)), packed.folder, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
