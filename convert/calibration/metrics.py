"""How far a packed model's answers lie from its 16-bit source's."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import WORD_BITS, read_config
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.models.internvl import InternVL

PARTS = {"vision_model": "vision tower", "mlp1": "projector", "language_model": "language model"}
FLOAT_BYTES = 4
FLOAT32_LIMIT_BYTES = 2e9  # of float32 log-probabilities; more are kept as float16


@dataclass(frozen=True)
class QualityMetrics:
    """Means over the judged tokens. ``kl`` is KL(16-bit || packed) in nats; ``top1`` the share of
    tokens on whose likeliest successor both agree; perplexities are of the 16-bit model's text."""

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def answer_log_probs(
    model: InternVL, sample: CalibrationSample, features: mx.array | None = None
) -> mx.array:
    """Score the judged tokens' successors: (K, vocab) float32 log-probabilities."""
    if features is None and sample.tiles is not None:
        features = model.get_image_features(mx.array(sample.tiles))
    language, length = model.language_model, len(sample.token_ids)
    states = language.model(model.embed(sample.input_ids, features), language.rotary(0, length))
    return log_softmax(language.head(states[0, sample.first_scored : -1]))


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(wanted: mx.array, got: mx.array) -> mx.array:
    """KL(wanted || got) of each row. (K, vocab) log-probabilities -> (K,)."""
    return (mx.exp(wanted) * (wanted - got)).sum(axis=-1)


def reference_log_probs(model: InternVL, samples: Sequence[CalibrationSample]) -> list[mx.array]:
    """Keep what the 16-bit model says, in half precision where there is much of it."""
    vocabulary = model.config.text.vocab_size
    nbytes = sum(len(s.token_ids) - s.first_scored for s in samples) * vocabulary * FLOAT_BYTES
    dtype = mx.float32 if nbytes < FLOAT32_LIMIT_BYTES else mx.float16
    kept = []
    for sample in samples:
        scores = answer_log_probs(model, sample).astype(dtype)
        mx.eval(scores)
        kept.append(scores)
    return kept


def compute_metrics(
    model: InternVL, samples: Sequence[CalibrationSample], wanted: Sequence[mx.array]
) -> QualityMetrics:
    """Measure a model on samples whose ``reference`` is known."""
    kl = agreed = loss = own_loss = 0.0
    tokens = 0
    for sample, kept in zip(samples, wanted, strict=True):
        truth, got = log_softmax(kept), answer_log_probs(model, sample)
        following = mx.array(sample.token_ids[sample.first_scored + 1 :])[:, None]
        sums = (
            kl_divergence(truth, got).sum(),
            (truth.argmax(-1) == got.argmax(-1)).sum(),
            -mx.take_along_axis(got, following, axis=-1).sum(),
            -mx.take_along_axis(truth, following, axis=-1).sum(),
        )
        values = [float(x.item()) for x in sums]  # type: ignore[arg-type]
        kl, agreed = kl + values[0], agreed + values[1]
        loss, own_loss = loss + values[2], own_loss + values[3]
        tokens += got.shape[0]
    kl = max(kl, 0.0)  # of equal models rounding leaves a hair on either side of it
    return QualityMetrics(
        kl / tokens, agreed / tokens, exp(loss / tokens), exp(own_loss / tokens), tokens
    )


def bits_per_part(folder: Path) -> dict[str, float]:
    """Say how many bits a parameter takes in each part, scales and biases counted."""
    checkpoint = open_checkpoint(folder)
    config, moves = plan_remap(checkpoint, read_config(folder))
    totals = {name: [0, 0] for name in PARTS}
    for move in moves:
        module, _, kind = move.targets[0].rpartition(".")
        total = totals[module.split(".", 1)[0]]
        for info in (checkpoint.tensors[source] for source in move.sources):
            total[1] += info.nbytes
            if kind in ("scales", "biases"):
                continue
            words = info.dtype == "U32" and config.quantization is not None
            count = prod(info.shape)
            if words and config.quantization is not None:
                count = count * WORD_BITS // config.quantization.for_module(module).bits
            total[0] += count
    return {PARTS[name]: 8 * nbytes / count for name, (count, nbytes) in totals.items() if count}
