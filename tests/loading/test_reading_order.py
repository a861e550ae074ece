"""The first weights are asked for before the tokenizer is read."""

import mlx.core as mx
import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.loading import build
from internvl3_mlx.prompt.tokenizer import Tokenizer


@pytest.fixture
def begun(monkeypatch):
    """Record the bytes that were asked for before and after the tokenizer was read."""
    found = {"before": [], "after": []}
    read, begin = Tokenizer.from_folder, mx.async_eval
    place = ["before"]

    def reading(*args, **options):
        place[0] = "after"
        return read(*args, **options)

    def beginning(arrays):
        found[place[0]] += [array.nbytes for array in arrays]
        begin(arrays)

    monkeypatch.setattr(Tokenizer, "from_folder", reading)
    monkeypatch.setattr(mx, "async_eval", beginning)
    return found


def test_weights_are_read_while_the_tokenizer_is(begun):
    loaded = build.load_local_model(tiny(Recipe()).folder)
    assert sum(begun["before"]) > 10_000
    assert begun["after"] == []
    assert loaded.model.image_id == loaded.tokenizer.image_id


def test_what_is_in_progress_at_once_is_bounded(begun, monkeypatch):
    limit = 20_000
    monkeypatch.setattr(build, "BEGUN_NBYTES", limit)
    build.load_local_model(tiny(Recipe()).folder)
    assert sum(begun["before"]) <= limit


def test_weights_that_are_about_to_change_are_not_read_early(begun):
    build.load_local_model(tiny(Recipe()).folder, for_training=True)
    assert begun["before"] == []
