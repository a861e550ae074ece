"""Source, adapter and target are kept apart by the files they are, not by their names."""

import os
import shutil

import pytest
from fixtures.loaded_models import tiny
from fixtures.mac_disk import ignore_spelling
from fixtures.tiny import Recipe

from internvl3_mlx.convert.pipeline import ConvertOptions, convert_checkpoint
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.device import TF32_VARIABLE
from internvl3_mlx.errors import UserError


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(tiny(Recipe()).folder, tmp_path / "InternVL3-Demo")


@pytest.mark.parametrize("other", ["internvl3-demo", "internvl3-demo/packed", "InternVL3-Demo"])
def test_another_spelling_of_the_source_is_the_source(source, monkeypatch, other):
    before = (source / "model.safetensors").read_bytes()
    ignore_spelling(monkeypatch, source.parent)
    options = ConvertOptions(overwrite=True)
    with pytest.raises(UserError, match="overlaps the source"):
        list(convert_checkpoint(source, source.parent / other, uniform_recipe(4), options))
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    assert (source / "model.safetensors").read_bytes() == before


def test_the_adapter_is_never_replaced_by_what_is_made_of_it(source, tmp_path, monkeypatch):
    adapter = tmp_path / "Adapter"
    adapter.mkdir()
    ignore_spelling(monkeypatch, tmp_path)
    options = ConvertOptions(overwrite=True, adapter=adapter)
    with pytest.raises(UserError, match="overlaps the adapter"):
        list(convert_checkpoint(source, tmp_path / "adapter", None, options))


@pytest.mark.parametrize(("chosen", "kept"), [(None, "0"), ("1", "1")])
def test_merged_and_quantized_weights_come_from_full_float32(
    source, tmp_path, monkeypatch, chosen, kept
):
    monkeypatch.setenv(TF32_VARIABLE, chosen or "")
    if chosen is None:
        monkeypatch.delenv(TF32_VARIABLE)
    with pytest.raises(UserError, match="overlaps"):
        list(convert_checkpoint(source, source, None))
    assert os.environ[TF32_VARIABLE] == kept
