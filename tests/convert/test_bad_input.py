"""Every failure is one line; the source is untouched and nothing half-written is left."""

import json
import os
import resource
import shutil
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from fixtures.checkpoints import write_json
from fixtures.conversions import run_conversion
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from safetensors.torch import load_file, save_file

from internvl3_mlx.checkpoints import verify
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.errors import InternVL3Error

NORM = "language_model.model.norm.weight"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path):
    shutil.copytree(tiny(Recipe(shards=2)).folder, tmp_path / "source")
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def failure(source: Path, target: Path, *, recipe=None, **options) -> str:
    """Expect a conversion to fail, in one line, and to leave everything as it was."""
    before, around = contents(source), sorted(target.parent.iterdir())
    with pytest.raises(InternVL3Error) as caught:
        run_conversion(source, target, recipe, **options)
    assert contents(source) == before
    assert sorted(target.parent.iterdir()) == around
    message = str(caught.value)
    assert "\n" not in message
    return message


def damage(folder: Path, name: str, change) -> None:
    """Change one tensor of one of the shards."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights[name] = change(weights[name])
            save_file(weights, file, metadata={"format": "pt"})


def test_a_truncated_shard_is_named(source, tmp_path):
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model-00002-of-00002.safetensors is truncated" in failure(source, tmp_path / "out")


def test_an_index_that_names_the_wrong_file_is_refused(source, tmp_path):
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    files = sorted(set(table["weight_map"].values()))
    other = dict(zip(files, reversed(files), strict=True))
    table["weight_map"][NORM] = other[table["weight_map"][NORM]]
    write_json(index, table)
    assert "where it is not; download it again" in failure(source, tmp_path / "out")


def test_an_index_that_leads_out_of_its_folder_is_refused(source, tmp_path):
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][NORM] = "../other/model.safetensors"
    write_json(index, table)
    assert "is not an index of safetensors files" in failure(source, tmp_path / "out")


def test_a_half_downloaded_repository_is_refused(source, tmp_path):
    (source / "model-00002-of-00002.safetensors").unlink()
    message = failure(source, tmp_path / "out")
    assert "has no model-00002-of-00002.safetensors, which its index lists" in message


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_small_files_is_refused(source, tmp_path, missing):
    (source / missing).unlink()
    assert missing.split(".")[0] in failure(source, tmp_path / "out", layout="hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recipe", [None, uniform_recipe(4, 32)], ids=["dense", "quantized"])
def test_weights_that_are_nan_or_infinite_are_named(source, tmp_path, dtype, number, recipe):
    damage(
        source, DOWN, lambda x: x.to(getattr(torch, dtype)).index_fill(0, torch.tensor([7]), number)
    )
    message = failure(source, tmp_path / "out", recipe=recipe)
    assert message.startswith(f"{DOWN} contains NaN or infinite values")


def test_values_too_large_for_the_requested_dtype_are_named(source, tmp_path):
    damage(source, NORM, lambda x: x * 1e6)
    assert NORM in failure(source, tmp_path / "out", dtype="float16")


def test_the_source_as_target_is_refused(source, tmp_path):
    message = failure(source, source, overwrite=True)
    assert "overlaps the source" in message


@pytest.mark.parametrize("inside", ["out", "a/b"])
def test_a_target_inside_the_source_is_refused(source, inside):
    with pytest.raises(InternVL3Error, match="overlaps the source"):
        run_conversion(source, source / inside)


def test_a_target_around_the_source_is_refused(source):
    with pytest.raises(InternVL3Error, match="overlaps the source"):
        run_conversion(source, source.parent, overwrite=True)


def test_too_little_disk_space_is_reported_before_anything_is_written(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 1000))
    message = failure(source, tmp_path / "out")
    assert "of disk space, but only 0.0 MB are free in" in message
    assert message.endswith("free some space or choose another disk")


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        message = failure(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == (
        f"cannot write {tmp_path / 'out'}: File too large; nothing was left behind, "
        "check the path and the free disk space"
    )


@contextmanager
def as_nobody():
    """Give up root's rights, to which no folder is read-only."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_target_is_reported():
    with TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(tiny(Recipe()).folder, place / "source")
        (place / "shut").mkdir()
        for folder in (place, place / "source"):
            folder.chmod(0o755)
        for file in (place / "source").iterdir():
            file.chmod(0o644)
        (place / "shut").chmod(0o555)
        with as_nobody():
            message = failure(place / "source", place / "shut" / "out")
        (place / "shut").chmod(0o755)
    assert message.endswith(
        "out: Permission denied; nothing was left behind, check the path and the free disk space"
    )


def test_a_target_below_a_file_is_reported(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InternVL3Error, match="cannot write .*Not a directory; nothing was left"):
        run_conversion(source, tmp_path / "file" / "out")


def test_a_disk_that_reads_back_other_bytes_is_noticed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "file_checksum", lambda info: 1)
    message = failure(source, tmp_path / "out")
    assert "reads back differently than it was written" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"recipe": uniform_recipe(4)},
            "is already quantized; convert the 16-bit checkpoint instead",
        ),
        ({"layout": "hf"}, "is quantized and the hf layout cannot be; also dequantize it"),
        ({"layout": "gguf"}, "unknown layout 'gguf'; choose from mlx, original, hf"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose from float32, float16, bfloat16"),
    ],
)
def test_a_request_that_does_not_fit_a_quantized_checkpoint_is_refused(tmp_path, options, words):
    quantized = tiny(Recipe(layout="mlx", bits=Bits(group_size=32)))
    assert words in failure(quantized.folder, tmp_path / "out", **options)


def test_a_dense_checkpoint_cannot_be_dequantized(source, tmp_path):
    message = failure(source, tmp_path / "out", dequantize=True)
    assert "is not quantized; drop --dequantize" in message


def test_pytorch_layouts_are_not_quantized(source, tmp_path):
    message = failure(source, tmp_path / "out", recipe=uniform_recipe(4), layout="original")
    assert message == (
        "a checkpoint in the original layout cannot be quantized; "
        "drop the quantization or choose the mlx layout"
    )


def adapters(tmp_path: Path, change) -> Path:
    shutil.copytree(tiny(Recipe(lora="adapters")).folder, tmp_path / "lora")
    file = tmp_path / "lora" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return tmp_path / "lora"


MODULE = "language_model.base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(f"{MODULE}.lora_A.default.weight"), "has only part of an adapter"),
        (lambda w: w.pop(f"{MODULE}.base_layer.weight"), "has an adapter but no weight"),
        (
            lambda w: w.update({f"{MODULE}.lora_A.default.weight": torch.ones(3, 7)}),
            "its weight is (192, 128)",
        ),
        (
            lambda w: w.update({f"{MODULE}.lora_A.second.weight": torch.ones(3, 128)}),
            "has two adapters",
        ),
        (
            lambda w: w.update({f"{MODULE}.lora_magnitude_vector.default.weight": torch.ones(3)}),
            "has a DoRA adapter; merge it with PEFT first",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_named(tmp_path, change, words):
    message = failure(adapters(tmp_path, change), tmp_path / "out")
    assert words in message
    assert "layers.1.mlp.up_proj" in message


def test_an_adapter_of_unknown_scale_is_refused(tmp_path):
    folder = adapters(tmp_path, lambda weights: None)
    content = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", content | {"use_llm_lora": 0})
    assert "has an adapter of unknown scale" in failure(folder, tmp_path / "out")


def test_an_adapter_config_names_the_scale(tmp_path):
    folder = adapters(tmp_path, lambda weights: None)
    write_json(folder / "adapter_config.json", {"r": 3, "lora_alpha": 6})
    run_conversion(folder, tmp_path / "out")
    write_json(folder / "adapter_config.json", {"r": 3, "lora_alpha": 3})
    run_conversion(folder, tmp_path / "half")
    one, half = (load_file(tmp_path / n / "model.safetensors")[DOWN] for n in ("out", "half"))
    assert not torch.equal(one, half)
