"""Metrics of a quantized model against its 16-bit source: KL divergence, agreement, perplexity."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.checkpoints.reader import PART_NAMES, open_checkpoint, parameters_by_part
from internvl3_mlx.config import read_config
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.models.internvl import InternVL

FLOAT_BYTES = 4
MAX_EXPONENT = 700  # of e, in a float
FLOAT32_LIMIT_BYTES = 2e9  # of log-probabilities; beyond that they are kept in float16


@dataclass(frozen=True)
class QualityMetrics:
    """Means over the scored tokens.

    ``kl`` is KL(16-bit || quantized) in nats, ``top1`` the share of tokens whose most likely
    successor is the same in both models. The perplexities are those of the 16-bit model's answers.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OutputCheck:
    """How a target's outputs compare with its source's: on one generated question about an image,
    and on a passage of plain English, which the verdict is about. ``reading`` is the KL divergence
    of our reading of the source from that of transformers, None where that was not possible."""

    probe: QualityMetrics
    text: QualityMetrics
    reading: float | None = None

    @property
    def kl(self) -> float:
        """Return the KL divergence on the generated question."""
        return self.probe.kl


def answer_log_probs(model: InternVL, sample: CalibrationSample) -> mx.array:
    """Return the log-probabilities of the token after each scored one: (K, vocab) float32."""
    features = None if sample.tiles is None else model.get_image_features(mx.array(sample.tiles))
    language, length = model.language_model, len(sample.token_ids)
    states = language.model(model.embed(sample.input_ids, features), language.rotary(0, length))
    return log_softmax(language.head(states[0, sample.first_scored : -1]))


def log_softmax(logits: mx.array) -> mx.array:
    """Normalize logits over the last axis, in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(expected: mx.array, actual: mx.array) -> mx.array:
    """Return KL(expected || actual) for each row: (K, vocab) log-probabilities -> (K,)."""
    return (mx.exp(expected) * (expected - actual)).sum(axis=-1)


def reference_log_probs(model: InternVL, samples: Sequence[CalibrationSample]) -> list[mx.array]:
    """Return the 16-bit model's log-probabilities for each sample: (K, vocab), in float16 when they
    would be too large in float32."""
    scored = sum(len(sample.token_ids) - sample.first_scored for sample in samples)
    nbytes = scored * model.config.text.vocab_size * FLOAT_BYTES
    dtype = mx.float32 if nbytes < FLOAT32_LIMIT_BYTES else mx.float16
    reference = []
    for sample in samples:
        log_probs = answer_log_probs(model, sample).astype(dtype)
        mx.eval(log_probs)
        reference.append(log_probs)
    return reference


def compute_metrics(
    model: InternVL, samples: Sequence[CalibrationSample], reference: Sequence[mx.array]
) -> QualityMetrics:
    """Compare a model with ``reference``, the 16-bit model's log-probabilities of each sample."""
    return compare_log_probs(samples, reference, (answer_log_probs(model, s) for s in samples))


def compare_log_probs(
    samples: Sequence[CalibrationSample],
    reference: Sequence[mx.array],
    quantized: Iterable[mx.array],
) -> QualityMetrics:
    """Compare the log-probabilities of two models for each sample: (K, vocab)."""
    kl = agreed = loss = reference_loss = 0.0
    tokens = 0
    for sample, stored, actual in zip(samples, reference, quantized, strict=True):
        expected = log_softmax(stored)
        following = mx.array(sample.token_ids[sample.first_scored + 1 :])[:, None]
        sums = (
            kl_divergence(expected, actual).sum(),
            (expected.argmax(-1) == actual.argmax(-1)).sum(),
            -mx.take_along_axis(actual, following, axis=-1).sum(),
            -mx.take_along_axis(expected, following, axis=-1).sum(),
        )
        values = [float(x.item()) for x in sums]  # type: ignore[arg-type]
        kl, agreed = kl + values[0], agreed + values[1]
        loss, reference_loss = loss + values[2], reference_loss + values[3]
        tokens += actual.shape[0]
    kl = max(kl, 0.0)  # rounding can put equal models slightly below zero
    return QualityMetrics(
        kl=kl / tokens,
        top1=agreed / tokens,
        perplexity=safe_exp(loss / tokens),
        reference_perplexity=safe_exp(reference_loss / tokens),
        tokens=tokens,
    )


def safe_exp(value: float) -> float:
    """Return e to the power of ``value``, infinite where a float cannot hold it."""
    return exp(value) if value < MAX_EXPONENT else inf


@dataclass(frozen=True)
class Verdict:
    """What a KL divergence and an agreement mean: at most ``kl`` nats and at least ``top1``."""

    words: str
    kl: float
    top1: float
    advice: str


# Measured on a language model of 135M parameters, see docs/quantization.md. The KL divergence
# decides; the share of equal tokens, of which a passage has few, only guards it, and its bounds lie
# a standard deviation (4 points) below what is measured at that KL.
VERDICTS = (
    Verdict("as good as before", 0.01, 0.93, ""),
    Verdict("noticeable", 0.15, 0.70, "for answers closer to the original, take more bits"),
    Verdict("poor", 0.35, 0.58, "take more bits (--q-bits 6 or 8), or --calibrate"),
    Verdict("ruined", inf, 0.0, "do not use this model; take --q-bits 6 or 8, or --calibrate"),
)


def judge(metrics: QualityMetrics) -> Verdict:
    """Return the first verdict whose two thresholds are both kept."""
    return next(
        (v for v in VERDICTS if metrics.kl <= v.kl and metrics.top1 >= v.top1), VERDICTS[-1]
    )


def describe_quality(metrics: QualityMetrics) -> str:
    """Say in one line what the metrics mean, and what to do."""
    verdict = judge(metrics)
    figures = f"KL {metrics.kl:.3f}, {metrics.top1:.0%} of the next tokens equal"
    return f"{verdict.words} ({figures})" + (f": {verdict.advice}" if verdict.advice else "")


def bits_per_part(folder: Path) -> dict[str, float]:
    """Return the mean bits per parameter of each part of the model, scales and biases included."""
    sizes = parameters_by_part(open_checkpoint(folder), read_config(folder))
    return {PART_NAMES[part]: size.bits for part, size in sizes.items() if size.parameters}
