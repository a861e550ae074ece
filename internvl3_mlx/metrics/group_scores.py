"""Scores that only a group of answers has: POPE's F1, MME, HallusionBench, scores by category.

Each turns the answers into sums whose ratio is the score, one row for each independent group. The
bootstrap of ``statistics`` draws such rows again to give the interval.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]  # (G, K), K sums of each of G groups
Statistic = Callable[[Sums], Sums]  # (…, K) summed over groups -> (…)

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


@dataclass(frozen=True)
class ScoredItem:
    """One answer with what groups it. score: 0 to 1. said, true: yes or no, where that is asked.

    group: what the item shares with others that it must not be separated from, such as an image.
    figure, question: the two ways in which HallusionBench groups its items.
    """

    score: float
    category: str = ""
    group: Hashable = None
    said: str | None = None
    true: str | None = None
    figure: Hashable = None
    question: Hashable = None


@dataclass(frozen=True, eq=False)
class GroupScore:
    """Sums of each group, and the statistic of their total. names: what further scores mean."""

    sums: Sums
    statistic: Statistic
    scale: float = 1.0

    @property
    def value(self) -> float:
        return float(self.statistic(self.sums.sum(axis=0)))


def divide(numerator: Sums, denominator: Sums) -> Sums:
    """Divide elementwise; 0 where the denominator is 0."""
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, 0.0, numerator / safe)


def mean_f1(items: Sequence[ScoredItem]) -> GroupScore:
    """Return POPE's score: the unweighted mean over the categories of the F1 of "yes"."""
    categories = sorted({item.category for item in items})
    sums = np.zeros((len(items), 3 * len(categories)))
    for row, item in enumerate(items):
        column = 3 * categories.index(item.category)
        said, true = item.said == "yes", item.true == "yes"
        sums[row, column : column + 3] = said and true, said and not true, true and not said

    def statistic(totals: Sums) -> Sums:
        hits, wrong, missed = (totals[..., k::3] for k in range(3))
        return divide(2 * hits, 2 * hits + wrong + missed).mean(axis=-1)

    return GroupScore(sums, statistic)


def mme(items: Sequence[ScoredItem], categories: Sequence[str] | None = None) -> GroupScore:
    """Return MME's score: per category the percentage of right answers and of right images, added.

    An image is right if all its questions are. The score is the sum over the categories, 200 each.
    """
    wanted = [*(categories or sorted({item.category for item in items}))]
    groups: dict[Hashable, list[ScoredItem]] = defaultdict(list)
    for item in items:
        if item.category in wanted:
            groups[(item.category, item.group)].append(item)
    sums = np.zeros((len(groups), 4 * len(wanted)))
    for row, members in enumerate(groups.values()):
        column = 4 * wanted.index(members[0].category)
        right = sum(item.score for item in members)
        sums[row, column : column + 4] = right, len(members), right == len(members), 1

    def statistic(totals: Sums) -> Sums:
        right, asked, images_right, images = (totals[..., k::4] for k in range(4))
        return (100 * divide(right, asked) + 100 * divide(images_right, images)).sum(axis=-1)

    return GroupScore(sums, statistic)


def hallusion(items: Sequence[ScoredItem]) -> GroupScore:
    """Return HallusionBench's score: the mean of its accuracies by answer, figure and question.

    A figure, and a question asked about several figures, is right if all its answers are.
    """
    groups: dict[Hashable, list[ScoredItem]] = defaultdict(list)
    for item in items:
        groups[(item.category, item.group)].append(item)
    rows = [
        [*_right_of(members, range(len(members))),
         *_right_of(members, [item.figure for item in members]),
         *_right_of(members, [item.question for item in members])]
        for members in groups.values()
    ]  # fmt: skip

    def statistic(totals: Sums) -> Sums:
        return divide(totals[..., 0::2], totals[..., 1::2]).mean(axis=-1)

    return GroupScore(np.array(rows, dtype=np.float64).reshape(-1, 6), statistic)


def _right_of(items: Sequence[ScoredItem], keys: Iterable[Hashable]) -> tuple[int, int]:
    """Count the keys whose items are all right, and all keys."""
    found: dict[Hashable, bool] = {}
    for item, key in zip(items, keys, strict=True):
        found[key] = found.get(key, True) and item.score == 1
    return sum(found.values()), len(found)


def mean_score(scores: Sequence[float]) -> GroupScore:
    """Return the mean of scores, each in a group of its own."""
    sums = np.column_stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))])
    return GroupScore(sums, lambda totals: divide(totals[..., 0], totals[..., 1]))


def all_right(items: Sequence[ScoredItem]) -> GroupScore:
    """Return the share of groups whose items are all right (MMBench's CircularEval)."""
    groups: dict[Hashable, bool] = {}
    for item in items:
        groups[item.group] = groups.get(item.group, True) and item.score == 1
    return mean_score([float(right) for right in groups.values()])
