"""How many tiles the images of a record get, and how many frames its videos."""

from collections import Counter

import numpy as np
import pytest
from fixtures.records import chat_record, open_records, write_image, write_jsonl
from fixtures.videos import make_video

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.validate import validation_report

SIZES = ((300, 100), (90, 400), (700, 500))


def tiles(tmp_path, count, **settings):
    names = [f"{n}.png" for n in range(count)]
    for name, (width, height) in zip(names, SIZES, strict=False):
        write_image(tmp_path / name, width, height)
    record = chat_record("Same?", images=names)
    opened = open_records(write_jsonl(tmp_path / "r.jsonl", [record]), **settings)
    sample = opened[1].build_sample(opened[0][0])
    report = validation_report(*opened)
    found = [len(image.tiles) for image in sample.images]
    assert report.sizes.tiles.tolist() == [sum(found)]
    assert report.sizes.tokens.tolist() == [len(sample.input_ids)]
    return found


def published(width, height, limit):
    """Count tiles as the published dynamic_preprocess does, with a thumbnail."""
    ratios = sorted(
        {(i, j) for i in range(1, limit + 1) for j in range(1, limit + 1) if i * j <= limit},
        key=lambda ratio: ratio[0] * ratio[1],
    )
    best, best_difference = (1, 1), float("inf")
    for i, j in ratios:
        difference = abs(width / height - i / j)
        if difference < best_difference:
            best, best_difference = (i, j), difference
        elif difference == best_difference and width * height > 0.5 * 112 * 112 * i * j:
            best = (i, j)
    count = best[0] * best[1]
    return count + (count > 1)


@pytest.mark.parametrize(("limit", "count"), [(12, 1), (12, 2), (12, 3), (7, 3), (2, 3)])
def test_the_images_of_a_record_share_the_tile_limit_as_published(tmp_path, limit, count):
    expected = [published(*size, max(1, limit // count)) for size in SIZES[:count]]
    assert tiles(tmp_path, count, max_tiles=limit) == expected


def test_each_image_may_have_the_whole_limit(tmp_path):
    expected = [published(*size, 12) for size in SIZES]
    assert tiles(tmp_path, 3, max_tiles=12, multi_image_tiles="each") == expected


@pytest.fixture
def video(tmp_path):
    (tmp_path / "v.mp4").write_bytes(make_video(count=12))
    return write_jsonl(tmp_path / "r.jsonl", [chat_record("?", video="v.mp4")] * 3)


def test_the_number_of_frames_is_drawn_for_each_record_and_epoch(video):
    dataset, preprocessor = open_records(video, num_frames=5, min_frames=2)
    drawn = [
        len(preprocessor.build_sample(record, epoch).images)
        for record in dataset
        for epoch in range(8)
    ]
    assert {*drawn} == {2, 3, 4, 5}
    assert max(Counter(drawn).values()) < 12
    again = len(preprocessor.build_sample(dataset[1], 3).images)
    assert again == drawn[8 + 3]
    assert validation_report(dataset, preprocessor).sizes.tiles.tolist() == [5, 5, 5]


def test_the_number_of_frames_is_fixed_by_default(video):
    dataset, preprocessor = open_records(video, num_frames=3)
    samples = [preprocessor.build_sample(dataset[0], epoch) for epoch in range(3)]
    assert [len(sample.images) for sample in samples] == [3, 3, 3]
    assert np.array_equal(samples[0].input_ids, samples[2].input_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_frames": 9}, "min_frames 9 is more than num_frames 8"),
        ({"valid_share": 0.1, "valid_data": "x"}, "valid_share and valid_data are mutually"),
        ({"valid_share": 0}, "valid_share is 0; set a fraction above 0"),
        ({"on_bad_row": "ask"}, "on_bad_row is ask; choose from skip, stop"),
        ({"multi_image_tiles": "some"}, "multi_image_tiles is some; choose from shared, each"),
        (
            {"method": "mpo", "min_frames": 2, "cache_reference": True, "train": ("mlp1",)},
            "min_frames changes the prompts, and the reference is computed before training",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        TrainConfig(**settings)
    assert message in str(caught.value)


def test_a_folder_of_frames_is_a_video_in_records_too(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(6):
        write_image(tmp_path / "frames" / f"{number}.png", 20 + number, 30)
    rows = write_jsonl(tmp_path / "r.jsonl", [chat_record("?", video="frames")])
    dataset, preprocessor = open_records(rows, num_frames=3)
    sample = preprocessor.build_sample(dataset[0], 0)
    assert [image.info.source for image in sample.images] == [f"frames/{n}.png" for n in (0, 2, 3)]
    report = validation_report(dataset, preprocessor, decode=True)
    assert ([*report.errors], report.sizes.tiles.tolist()) == ([], [3])
    (tmp_path / "frames" / "3.png").write_bytes(b"cut")
    [error] = validation_report(dataset, preprocessor, decode=True).errors
    assert "frames/3.png" in error.message
