"""Intervals of means and of differences: Wilson, bootstrap, and the exact test of changed items."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.metrics.group_scores import GroupScore, Sums, mean_score

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95% interval
RESAMPLES = 2000
CHUNK_CELLS = 4_000_000  # numbers of one chunk of resampling weights: 32 MB


@dataclass(frozen=True)
class Interval:
    """A 95% interval, and how it was computed."""

    low: float
    high: float
    method: Literal["wilson", "bootstrap"]


@dataclass(frozen=True)
class PairedDifference:
    """The mean of B - A over the same items. better, worse: items whose score rose or fell.

    p_value: two-sided, of the exact sign test over the items that changed.
    """

    n: int
    mean: float
    interval: Interval
    better: int
    worse: int
    p_value: float


def wilson(successes: float, n: int, z: float = Z_95) -> Interval:
    """Return Wilson's interval of a proportion. Raises ``ValueError`` without observations."""
    if n < 1:
        raise ValueError("no observations; a proportion needs at least one")
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes <= 0 else max(0.0, center - half)
    high = 1.0 if successes >= n else min(1.0, center + half)
    return Interval(low, high, "wilson")


def bootstrap(score: GroupScore, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the percentile interval of a statistic whose groups are drawn again.

    The same seed gives the same interval. Raises ``ValueError`` without groups.
    """
    count = len(score.sums)
    if not count:
        raise ValueError("no observations; a bootstrap needs at least one")
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_CELLS // count)
    values: list[Sums] = []
    for start in range(0, resamples, chunk):
        weights = _draw_weights(generator, count, min(chunk, resamples - start))
        values.append(score.statistic(weights @ score.sums))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def _draw_weights(generator: np.random.Generator, groups: int, resamples: int) -> Sums:
    """Draw how often each group occurs in each resample: (R, G)."""
    drawn = generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    return drawn.astype(np.float64)


def mean_interval(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the interval of a mean: Wilson's for scores of 0 and 1, else the bootstrap's."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap(mean_score(scores), seed=seed)


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> PairedDifference:
    """Compare two runs over the same items, in the same order.

    Differences are taken item by item, so what makes an item hard for both runs cancels out.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} scores; a paired difference needs the same items")
    differences: NDArray[np.float64] = np.asarray(b, dtype=np.float64) - np.asarray(a)
    score = mean_score(list(differences))
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(
        n=len(differences),
        mean=score.value,
        interval=bootstrap(score, seed=seed),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided exact p-value that gains and losses are equally likely (McNemar)."""
    n, least = better + worse, min(better, worse)
    tail = sum(comb(n, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**n)
