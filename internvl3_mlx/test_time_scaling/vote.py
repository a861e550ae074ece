"""Choose among candidates without a critic: by majority, or by their own likelihood."""

from collections import Counter
from collections.abc import Sequence

from internvl3_mlx.metrics.answers import vote_key


def vote_shares(texts: Sequence[str]) -> list[float]:
    """Return for each text which share of all votes its final answer has; an empty one has none.

    Final answers are compared without case and surrounding marks (self-consistency).
    """
    keys = [vote_key(text) for text in texts]
    counts = Counter(filter(None, keys))
    total = sum(counts.values())
    return [counts[key] / total if key else 0.0 for key in keys]


def first_best(scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first of equal ones: candidate 0 is greedy."""
    return max(range(len(scores)), key=lambda index: (scores[index], -index))
