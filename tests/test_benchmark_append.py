"""The benchmark of appending measures what it says."""

from benchmarks import append
from benchmarks.append import ROOMS, filled_plain, filled_segments, measure
from internvl3_mlx.models.segmented_cache import SegmentedKVCache


def test_every_case_is_measured_and_both_kinds_hold_the_same_tokens():
    found = list(measure(tokens=300, runs=2))
    assert len(found) == 2 * len(ROOMS) * 2
    assert all(one.microseconds > 0 for one in found)
    plain, segments = filled_plain(300, 8), filled_segments(300, 8)
    assert isinstance(segments, SegmentedKVCache)
    assert (plain.offset, segments.offset) == (300, 301)
    assert segments.parts[0].capacity == plain.arrays[0].shape[-2] >= 8 * 300
    append.append(plain, *append.random_tokens(1))
    assert plain.offset == 301
