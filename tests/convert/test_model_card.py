"""The model card: what the hub sorts by, and what people read."""

from dataclasses import replace

import pytest
import yaml
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import convert_model
from internvl3_mlx.convert.api import card_data, default_target_name
from internvl3_mlx.convert.calibration.metrics import QualityMetrics
from internvl3_mlx.convert.model_card import find_base_model, model_card, read_license

LICENSE = (
    "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.org\ntags: [a]\n---\nText\n"
)
COMMAND = "internvl3 convert OpenGVLab/InternVL3-2B -q"


def card(tmp_path, **keywords):
    result = convert_model(tiny(Recipe()).folder, tmp_path / "out", verify=False, **keywords)
    quality = QualityMetrics(0.0123, 0.97, 3.2, 3.1, 456)
    text = model_card(
        card_data(replace(result, quality=quality), COMMAND), read_license(result.source)
    )
    _, front, body = text.split("---\n", 2)
    written = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert written.split("---\n", 2)[1] == front
    return yaml.safe_load(front), body


def test_a_quantized_model_is_listed_under_its_base(tmp_path):
    front, body = card(tmp_path, bits=4, group_size=32)
    assert front["library_name"] == "mlx"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["base_model_relation"] == "quantized"
    assert front["tags"] == ["mlx", "internvl", "internvl3-mlx", "4-bit"]
    for words in (
        COMMAND,
        "| language model | 6.",
        "KL divergence 0.01230",
        "97.0%",
        "are present",
    ):
        assert words in body


def test_a_sixteen_bit_copy_has_no_relation(tmp_path):
    front, body = card(tmp_path)
    assert "base_model_relation" not in front
    assert "| vision tower | 32.00 |" in body


def test_a_pytorch_copy_says_which_library_loads_it(tmp_path):
    front, _ = card(tmp_path, layout="hf")
    assert front["library_name"] == "transformers"
    assert "mlx" not in front["tags"]


def test_the_license_is_carried_over(tmp_path):
    (tmp_path / "README.md").write_text(LICENSE)
    assert read_license(tmp_path) == {
        "license": "other", "license_name": "qwen", "license_link": "https://x.org"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "no front", "---\n: [\n---\n", "---\n---\nx"])
def test_a_card_without_a_license_names_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path) == {}


@pytest.mark.parametrize(
    ("folder", "content", "name"),
    [
        ("models--OpenGVLab--InternVL3-2B/snapshots/abc", {}, "OpenGVLab/InternVL3-2B"),
        ("InternVL3-8B", {}, "OpenGVLab/InternVL3-8B"),
        ("mine", {"_name_or_path": "OpenGVLab/InternVL3-1B-hf"}, "OpenGVLab/InternVL3-1B-hf"),
        ("mine", {}, "mine"),
    ],
)
def test_the_base_is_named_by_its_repository(tmp_path, folder, content, name):
    assert find_base_model(tmp_path / folder, content) == name


def test_a_target_is_named_the_way_the_hub_does(tmp_path):
    assert default_target_name(tmp_path / "InternVL3-2B", "4bit") == "InternVL3-2B-4bit"
