"""The table of quantized KV caches: one forward pass reads what decoding token by token reads."""

import mlx.core as mx
import pytest

from benchmarks.smollm2_cache import cached_log_probs
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import answer_log_probs, log_softmax
from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

GROUP = 32  # as wide as a head of the demo


@pytest.fixture(scope="module")
def loaded():
    return build_model(DEMO_FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def sample(loaded):
    return CalibrationSample(
        list(loaded.tokenizer.encode_text("How many dogs are there?")), None, 0
    )


def one_by_one(model, sample, bits):
    """Decode the tokens one at a time, each with its own call."""
    language = model.language_model
    cache = [QuantizedKVCache(bits, GROUP) for _ in language.model.layers]
    steps = []
    for at in range(len(sample.token_ids) - 1):
        token = model.embed(sample.input_ids[:, at : at + 1])
        states = language.model(token, language.rotary(at, 1), cache)
        steps.append(language.head(states[0]))
    return log_softmax(mx.concatenate(steps))


@pytest.mark.parametrize("bits", [8, 4])
def test_one_pass_equals_decoding_token_by_token(loaded, sample, bits):
    expected = one_by_one(loaded.model, sample, bits)
    actual = cached_log_probs(loaded.model, sample, bits, GROUP)
    assert mx.abs(actual - expected).max().item() < 1e-3
    dense = answer_log_probs(loaded.model, sample)
    assert mx.abs(actual - dense).max().item() > 1e-2  # what was quantized shows
