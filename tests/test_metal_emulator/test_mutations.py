"""The emulator notices what is wrong with MLX's own kernels once somebody has spoilt them."""

import collections

import pytest
from test_metal_emulator.mlx_kernels import CASES, TOLERANCE
from test_metal_emulator.mutations import MUTATIONS

FEWEST_NOTICED, FEWEST_NAMED = 28, 20


@pytest.fixture(scope="module")
def noticed() -> collections.Counter:
    """Run each spoilt kernel and count how it was noticed, if it was."""
    counts: collections.Counter = collections.Counter()
    for mutation in MUTATIONS:
        case = CASES[mutation.kernel]("float32")
        run = case.run(mutation.text())
        if run.findings:
            counts["by name"] += 1
        elif not case.error(run) < TOLERANCE["float32"]:
            counts["by numbers"] += 1
        else:
            counts[f"missed: {mutation}"] += 1
    return counts


def test_there_are_thirty_and_each_changes_the_text():
    texts = {mutation.text() for mutation in MUTATIONS}
    assert len(texts) == len(MUTATIONS) == 30
    originals = {CASES[mutation.kernel]("float32").text for mutation in MUTATIONS}
    assert not texts & originals


def test_at_least_28_of_30_mutations_are_noticed(noticed):
    assert noticed["by name"] + noticed["by numbers"] >= FEWEST_NOTICED, noticed


def test_most_mutations_are_called_by_their_name(noticed):
    assert noticed["by name"] >= FEWEST_NAMED, noticed
