"""From records to samples: image order, positions, augmentation and truncation."""

import io

import numpy as np
import pytest
from fixtures.inputs import write_video
from fixtures.records import (
    chat_record,
    make_processor,
    open_records,
    pair_record,
    write_image,
    write_jsonl,
)
from PIL import Image

from internvl3_mlx.errors import DataError
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.open_media import open_media
from internvl3_mlx.images.load import image_size, open_image
from internvl3_mlx.prompt.v2pe import DELTAS, image_spans

PER_TILE = 16


def build_sample(tmp_path, record, epoch=0, **settings):
    dataset, preprocessor = open_records(
        write_jsonl(tmp_path / "train.jsonl", [record]), **settings
    )
    return preprocessor.build_sample(dataset[0], epoch)


@pytest.fixture
def images(tmp_path):
    write_image(tmp_path / "wide.png", 300, 100, seed=1)
    write_image(tmp_path / "tall.png", 110, 230, seed=2)
    write_video(tmp_path / "v.mp4", 20)
    return tmp_path


def test_images_and_frames_are_in_the_order_of_their_tokens(images):
    turns = [
        {"role": "user", "content": "<image> or <video>?"},
        {"role": "assistant", "content": "Neither."},
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "Yes."},
    ]
    record = {"messages": turns, "images": ["tall.png", "wide.png"], "video": "v.mp4"}
    sample = build_sample(images, record, num_frames=3, multi_image_tiles="each")
    tiles = [len(image.tiles) for image in sample.images]
    runs = image_spans(sample.input_ids, make_processor().tokenizer.image_id)
    assert tiles == [3, 1, 1, 1, 4]
    assert [(stop - start) // PER_TILE for start, stop in runs] == tiles
    chat = make_processor().process_image(images / "tall.png", GenerationConfig())
    assert np.array_equal(sample.images[0].tiles, chat.tiles)


def chat_inputs(question, images, config):
    processor = make_processor()
    media = open_media(processor, images, config.video, config)
    return processor.build_question(question, media.images, media.videos, config)


def test_images_before_the_question_are_encoded_as_in_a_chat(images):
    paths = [images / "wide.png", images / "tall.png"]
    settings = GenerationConfig(video=(str(images / "v.mp4"),), num_frames=2)
    chat = chat_inputs("Which?", paths, settings)
    record = chat_record("Which?", images=["wide.png", "tall.png"], video="v.mp4")
    sample = build_sample(images, record, num_frames=2, multi_image_tiles="each")
    assert sample.input_ids[: len(chat.token_ids)].tolist() == chat.token_ids
    shown = zip(sample.images, chat.processed_images, strict=True)
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in shown)
    assert sample.positions[: len(chat.positions)].tolist() == chat.positions.tolist()


def test_a_clip_takes_frames_from_its_part_of_the_video(images):
    whole = build_sample(images, chat_record("?", video="v.mp4"), num_frames=2)
    part = build_sample(images, chat_record("?", video="v.mp4", clip=[0, 0.5]), num_frames=2)
    assert whole.images[1].tiles.mean() > part.images[1].tiles.mean() + 20  # it grows brighter


def test_the_lower_tile_limit_counts(images):
    assert (
        build_sample(images, chat_record("?", image="wide.png"), max_tiles=2).images[0].info.tiles
        == 3
    )
    assert (
        build_sample(images, chat_record("?", image="wide.png"), max_tiles=1).images[0].info.tiles
        == 1
    )


@pytest.mark.parametrize("delta", ["1", "1/4", 0.00390625])
def test_a_fixed_delta_positions_every_image(images, delta):
    chat = chat_inputs("?", [images / "wide.png"], GenerationConfig(v2pe_delta=delta))
    sample = build_sample(images, chat_record("?", image="wide.png"), v2pe_delta=delta)
    assert sample.positions[: len(chat.positions)].tolist() == chat.positions.tolist()
    assert sample.positions.dtype == np.float32


def deltas_of(sample):
    runs = image_spans(sample.input_ids, make_processor().tokenizer.image_id)
    return [float(sample.positions[start + 1] - sample.positions[start]) for start, _ in runs]


def test_a_random_delta_is_one_of_nine_drawn_for_each_image(images):
    record = chat_record("?", images=["wide.png", "tall.png"])
    drawn = [deltas_of(build_sample(images, record, n, v2pe_delta="random")) for n in range(60)]
    assert {step for steps in drawn for step in steps} == {*DELTAS}
    assert any(first != second for first, second in drawn)
    again = build_sample(images, record, 7, v2pe_delta="random")
    assert deltas_of(again) == drawn[7]
    assert np.all(np.diff(again.positions) > 0)


def through_jpeg(tile, quality):
    file = io.BytesIO()
    Image.fromarray(tile).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_augmentation_is_jpeg_of_a_random_quality_for_each_tile(images):
    record = chat_record("?", image="wide.png")
    plain = build_sample(images, record).images[0].tiles
    tiles = build_sample(images, record, augment=True).images[0].tiles
    for before, after in zip(plain, tiles, strict=True):
        matches = [q for q in range(75, 101) if np.array_equal(through_jpeg(before, q), after)]
        assert matches
    assert not np.array_equal(tiles, build_sample(images, record, 1, augment=True).images[0].tiles)
    assert np.array_equal(tiles, build_sample(images, record, augment=True).images[0].tiles)


def test_frames_of_videos_are_never_augmented(images):
    record = chat_record("?", video="v.mp4")
    plain, wanted = (build_sample(images, record, augment=flag) for flag in (False, True))
    shown = zip(plain.images, wanted.images, strict=True)
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in shown)


def test_a_long_answer_is_truncated_and_the_rest_is_trained_on(images):
    record = chat_record("?", "cat dog " * 100, image="wide.png")
    whole = build_sample(images, record)
    limit = int(np.flatnonzero(whole.loss_mask)[9])
    short = build_sample(images, record, max_seq_length=limit)
    assert np.array_equal(short.input_ids, whole.input_ids[:limit])
    assert np.array_equal(short.positions, whole.positions[:limit])
    assert short.loss_mask.sum() == 9


def test_images_are_never_truncated(images):
    turns = [*chat_record("?")["messages"], *chat_record("<image>")["messages"]]
    record = {"messages": turns, "image": "wide.png"}
    length = len(build_sample(images, record).input_ids)
    told = f"train.jsonl:1: {length} tokens, and an image extends past the limit of 60"
    with pytest.raises(DataError, match=told):
        build_sample(images, record, max_seq_length=60)
    # the image's end token is the last one that must fit
    last = image_spans(build_sample(images, record).input_ids, make_processor().tokenizer.image_id)[
        0
    ][1]
    with pytest.raises(DataError, match="an image extends past the limit"):
        build_sample(images, record, max_seq_length=last)
    assert len(build_sample(images, record, max_seq_length=last + 1).input_ids) == last + 1


def test_a_sample_without_an_answer_within_the_limit_is_refused(images):
    with pytest.raises(DataError, match="no answer begins within the limit of 50; raise"):
        build_sample(images, chat_record("where " * 80), max_seq_length=50)


def test_the_answers_of_a_pair_are_truncated_separately(images):
    record = pair_record("?", "cat " * 50, "dog", image="wide.png")
    file = write_jsonl(images / "p.jsonl", [record])
    dataset, preprocessor = open_records(file, method="mpo")
    whole = preprocessor.build_preference(dataset[0])
    limit = len(whole.prompt.input_ids) + 10
    dataset, preprocessor = open_records(file, method="mpo", max_seq_length=limit)
    short = preprocessor.build_preference(dataset[0])
    assert short.chosen.tolist() == whole.chosen[:10].tolist()
    assert short.rejected.tolist() == whole.rejected.tolist()
    dataset, preprocessor = open_records(
        file, method="mpo", max_seq_length=len(whole.prompt.input_ids)
    )
    with pytest.raises(DataError, match="a prompt of .* tokens, and no answer begins within"):
        preprocessor.build_preference(dataset[0])


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_header_gives_the_size_of_the_decoded_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    picture = open_image(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (picture.width, picture.height)
    assert (picture.width < picture.height) is (orientation == 6)


def test_an_image_that_breaks_during_training_names_its_record(images):
    dataset, preprocessor = open_records(
        write_jsonl(images / "train.jsonl", [chat_record("?", image="wide.png")])
    )
    assert preprocessor.measure(dataset[0]).tiles == 4
    whole = (images / "wide.png").read_bytes()
    (images / "wide.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.jsonl:1: cannot read .*wide.png"):
        preprocessor.build_sample(dataset[0])
