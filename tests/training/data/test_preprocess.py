"""From rows to samples: pictures in their order, positions, augmentation, and what is too long."""

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
from internvl3_mlx.images.load import image_size, open_image
from internvl3_mlx.prompt.v2pe import DELTAS, image_spans

PER_TILE = 16


def made(tmp_path, row, epoch=0, **settings):
    data, maker = open_records(write_jsonl(tmp_path / "train.jsonl", [row]), **settings)
    return maker.build_sample(data[0], epoch)


@pytest.fixture
def pictures(tmp_path):
    write_image(tmp_path / "wide.png", 300, 100, seed=1)
    write_image(tmp_path / "tall.png", 110, 230, seed=2)
    write_video(tmp_path / "v.mp4", 20)
    return tmp_path


def test_pictures_and_frames_come_in_the_order_of_their_tokens(pictures):
    turns = [
        {"role": "user", "content": "<image> or <video>?"},
        {"role": "assistant", "content": "Neither."},
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "Yes."},
    ]
    row = {"messages": turns, "images": ["tall.png", "wide.png"], "video": "v.mp4"}
    sample = made(pictures, row, num_frames=3)
    tiles = [len(seen.tiles) for seen in sample.seen]
    runs = image_spans(sample.ids, make_processor().tokenizer.image_id)
    assert tiles == [3, 1, 1, 1, 4]
    assert [(stop - start) // PER_TILE for start, stop in runs] == tiles
    chat = make_processor().look(pictures / "tall.png", GenerationConfig())
    assert np.array_equal(sample.seen[0].tiles, chat.tiles)


def test_pictures_before_the_question_are_laid_as_a_chat_lays_them(pictures):
    paths = [pictures / "wide.png", pictures / "tall.png"]
    settings = GenerationConfig(video=(str(pictures / "v.mp4"),), num_frames=2)
    chat = make_processor()("Which?", paths, settings)
    row = chat_record("Which?", images=["wide.png", "tall.png"], video="v.mp4")
    sample = made(pictures, row, num_frames=2)
    assert sample.ids[: len(chat.token_ids)].tolist() == chat.token_ids
    shown = zip(sample.seen, chat.seen, strict=True)
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in shown)
    assert sample.positions[: len(chat.positions)].tolist() == chat.positions.tolist()


def test_a_clip_takes_frames_from_its_part_of_the_video(pictures):
    whole = made(pictures, chat_record("?", video="v.mp4"), num_frames=2)
    part = made(pictures, chat_record("?", video="v.mp4", clip=[0, 0.5]), num_frames=2)
    assert whole.seen[1].tiles.mean() > part.seen[1].tiles.mean() + 20  # the film grows brighter


def test_the_lower_limit_of_tiles_counts(pictures):
    assert made(pictures, chat_record("?", image="wide.png"), max_tiles=2).seen[0].info.tiles == 3
    assert made(pictures, chat_record("?", image="wide.png"), max_tiles=1).seen[0].info.tiles == 1


@pytest.mark.parametrize("delta", ["1", "1/4", 0.00390625])
def test_a_fixed_step_places_every_picture(pictures, delta):
    chat = make_processor()("?", [pictures / "wide.png"], GenerationConfig(v2pe_delta=delta))
    sample = made(pictures, chat_record("?", image="wide.png"), v2pe_delta=delta)
    assert sample.positions[: len(chat.positions)].tolist() == chat.positions.tolist()
    assert sample.positions.dtype == np.float32


def steps_of(sample):
    runs = image_spans(sample.ids, make_processor().tokenizer.image_id)
    return [float(sample.positions[start + 1] - sample.positions[start]) for start, _ in runs]


def test_a_random_step_is_one_of_nine_drawn_for_each_picture(pictures):
    row = chat_record("?", images=["wide.png", "tall.png"])
    drawn = [steps_of(made(pictures, row, n, v2pe_delta="random")) for n in range(60)]
    assert {step for steps in drawn for step in steps} == {*DELTAS}
    assert any(first != second for first, second in drawn)
    again = made(pictures, row, 7, v2pe_delta="random")
    assert steps_of(again) == drawn[7]
    assert np.all(np.diff(again.positions) > 0)


def through_jpeg(tile, quality):
    file = io.BytesIO()
    Image.fromarray(tile).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_augmentation_is_jpeg_of_a_drawn_quality_tile_by_tile(pictures):
    row = chat_record("?", image="wide.png")
    plain = made(pictures, row).seen[0].tiles
    tiles = made(pictures, row, augment=True).seen[0].tiles
    for before, after in zip(plain, tiles, strict=True):
        matches = [q for q in range(75, 101) if np.array_equal(through_jpeg(before, q), after)]
        assert matches
    assert not np.array_equal(tiles, made(pictures, row, 1, augment=True).seen[0].tiles)
    assert np.array_equal(tiles, made(pictures, row, augment=True).seen[0].tiles)


def test_frames_of_videos_are_never_augmented(pictures):
    row = chat_record("?", video="v.mp4")
    plain, wanted = (made(pictures, row, augment=flag) for flag in (False, True))
    shown = zip(plain.seen, wanted.seen, strict=True)
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in shown)


def test_a_long_answer_is_cut_and_what_is_left_is_learned(pictures):
    row = chat_record("?", "cat dog " * 100, image="wide.png")
    whole = made(pictures, row)
    limit = int(np.flatnonzero(whole.loss_mask)[9])
    short = made(pictures, row, max_seq_length=limit)
    assert np.array_equal(short.ids, whole.ids[:limit])
    assert np.array_equal(short.positions, whole.positions[:limit])
    assert short.loss_mask.sum() == 9


def test_image_tokens_are_never_cut(pictures):
    turns = [*chat_record("?")["messages"], *chat_record("<image>")["messages"]]
    row = {"messages": turns, "image": "wide.png"}
    length = len(made(pictures, row).ids)
    told = f"train.jsonl:1: {length} tokens, and a picture lies beyond 60"
    with pytest.raises(DataError, match=told):
        made(pictures, row, max_seq_length=60)
    # the picture's end mark is the last that must fit
    last = image_spans(made(pictures, row).ids, make_processor().tokenizer.image_id)[0][1]
    with pytest.raises(DataError, match="a picture lies beyond"):
        made(pictures, row, max_seq_length=last)
    assert len(made(pictures, row, max_seq_length=last + 1).ids) == last + 1


def test_a_sample_with_no_answer_left_is_refused(pictures):
    with pytest.raises(DataError, match="no answer begins within 50; raise --max-seq-length"):
        made(pictures, chat_record("where " * 80), max_seq_length=50)


def test_a_pair_is_cut_answer_by_answer(pictures):
    row = pair_record("?", "cat " * 50, "dog", image="wide.png")
    file = write_jsonl(pictures / "p.jsonl", [row])
    data, maker = open_records(file, method="mpo")
    whole = maker.build_pair(data[0])
    limit = len(whole.prompt.input_ids) + 10
    data, maker = open_records(file, method="mpo", max_seq_length=limit)
    short = maker.build_pair(data[0])
    assert short.chosen.tolist() == whole.chosen[:10].tolist()
    assert short.rejected.tolist() == whole.rejected.tolist()
    data, maker = open_records(file, method="mpo", max_seq_length=len(whole.prompt.input_ids))
    with pytest.raises(DataError, match="a prompt of .* tokens, and no answer begins within"):
        maker.build_pair(data[0])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_header_gives_the_size_that_the_picture_has(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    picture = open_image(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (picture.width, picture.height)
    assert (picture.width < picture.height) is (orientation == 6)


def test_a_picture_that_breaks_while_training_names_its_row(pictures):
    data, maker = open_records(
        write_jsonl(pictures / "train.jsonl", [chat_record("?", image="wide.png")])
    )
    assert maker.measure(data[0]).tiles == 4
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "wide.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.jsonl:1: cannot read .*wide.png"):
        maker.build_sample(data[0])
