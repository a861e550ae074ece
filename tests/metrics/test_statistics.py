"""Group scores worked by hand, and intervals against published values and simulation."""

import numpy as np
import pytest

from internvl3_mlx.metrics.group_scores import ScoredItem, hallusion, mean_f1, mean_score, mme
from internvl3_mlx.metrics.statistics import (
    bootstrap,
    mean_interval,
    paired_difference,
    sign_test,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_published_intervals(right, n, low, high):
    found = wilson(right, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_all_right_is_not_certain():
    found = wilson(29, 29)
    assert found.high == 1
    assert found.low == pytest.approx(1 - wilson(0, 29).high)


def test_an_interval_needs_observations():
    with pytest.raises(ValueError, match="no observations"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="no observations"):
        bootstrap(mean_score([]))


def test_the_bootstrap_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(3).random(500)
    found = bootstrap(mean_score(list(scores)), seed=1)
    half = 1.96 * scores.std() / np.sqrt(500)
    assert found.low == pytest.approx(scores.mean() - half, abs=0.004)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.004)


def test_the_bootstrap_depends_on_the_seed_alone():
    scores = [0.2, 0.5, 0.9, 1.0, 0.0]
    assert bootstrap(mean_score(scores), seed=5) == bootstrap(mean_score(scores), seed=5)
    assert bootstrap(mean_score(scores), seed=5) != bootstrap(mean_score(scores), seed=6)


def test_the_method_follows_the_scores():
    assert mean_interval([0, 1, 1]).method == "wilson"
    assert mean_interval([0, 1, 0.5]).method == "bootstrap"


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        sample = generator.beta(2, 5, size=60)
        found = bootstrap(mean_score(list(sample)), seed=seed, resamples=400)
        covered += found.low <= 2 / 7 <= found.high
    assert 180 <= covered <= 199


def test_paired_differences_cancel_what_both_runs_share():
    hard = np.random.default_rng(1).random(300)
    same = paired_difference(list(hard), list(hard + 0.01))
    assert same.mean == pytest.approx(0.01)
    assert same.interval.low == pytest.approx(0.01)
    assert (same.better, same.worse) == (300, 0)


def test_paired_differences_count_changes():
    found = paired_difference([1, 1, 1, 0, 0], [1, 0, 0, 0, 1])
    assert (found.n, found.better, found.worse) == (5, 1, 2)
    assert found.mean == pytest.approx(-0.2)
    assert found.p_value == 1


def test_paired_differences_need_the_same_items():
    with pytest.raises(ValueError, match="3 and 2 scores"):
        paired_difference([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1), (5, 0, 2 / 32), (1, 8, 20 / 512), (3, 3, 1)]
)
def test_the_sign_test_is_binomial(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)


def test_pope_averages_the_f1_of_its_categories():
    def item(category, said, true):
        return ScoredItem(float(said == true), category, said=said, true=true)

    items = [
        *(item("popular", *pair) for pair in [("yes", "yes"), ("yes", "no"), ("no", "yes")]),
        *(item("random", *pair) for pair in [("yes", "yes"), ("no", "no")]),
    ]
    assert mean_f1(items).value == pytest.approx((2 / (2 + 1 + 1) + 1) / 2)


def test_mme_adds_answers_and_images_by_category():
    def pair(category, image, first, second):
        return [ScoredItem(score, category, group=image) for score in (first, second)]

    items = [*pair("count", 1, 1, 1), *pair("count", 2, 1, 0), *pair("color", 1, 0, 0)]
    # count: 3 of 4 answers and 1 of 2 images; color: nothing
    assert mme(items).value == pytest.approx(75 + 50)
    assert mme(items, ["color"]).value == 0


def test_hallusion_averages_answers_figures_and_questions():
    def item(score, figure, question, group):
        return ScoredItem(score, "chart", group, figure=figure, question=question)

    items = [item(1, 0, 0, "s"), item(0, 1, 0, "s"), item(1, 0, 1, "s"), item(1, 0, 0, "t")]
    answers, figures, questions = 3 / 4, 2 / 3, 2 / 3
    assert hallusion(items).value == pytest.approx((answers + figures + questions) / 3)


def test_groups_are_drawn_whole():
    paired = [ScoredItem(1, "a", group=n // 2) for n in range(20)]
    assert len(mme(paired).sums) == 10
    assert bootstrap(mme(paired)).low == pytest.approx(200)
