"""Records that cannot be read: found by the deep check, left out of a run, counted and named."""

from dataclasses import replace

import numpy as np
import pytest
from fixtures.records import chat_record, open_batches, open_records, write_image, write_jsonl
from fixtures.train_sessions import finish, select, small_config, small_session
from fixtures.videos import make_video

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.checkpoint import list_checkpoints
from internvl3_mlx.training.data.decode_check import DecodeCheck
from internvl3_mlx.training.data.media import MediaLoader
from internvl3_mlx.training.data.validate import validate_dataset, validation_report
from internvl3_mlx.training.dataloader import BadRecords, tolerated_bad_records
from internvl3_mlx.training.events import RecordLeftOut, TrainEnd, UpdateDone
from internvl3_mlx.training.run import check_data, train

BAD = 4  # the record whose image is cut short


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))


def write_records(folder, count=9, bad=(BAD,)):
    """Write records of one image each; some images lack their last bytes but have their header."""
    for number in range(count):
        image = write_image(folder / f"{number}.jpg", 90 + 10 * number, 70, number)
        if number in bad:
            image.write_bytes(image.read_bytes()[:-300])
    records = [chat_record("Who?" + "?" * n, f"{n}", image=f"{n}.jpg") for n in range(count)]
    return write_jsonl(folder / "train.jsonl", records)


def locations(batches):
    return [batch.locations for batch in batches]


def test_only_the_deep_check_finds_an_image_that_is_cut_short(tmp_path):
    opened = open_records(write_records(tmp_path))
    assert validation_report(*opened).errors == ()
    report = validation_report(*opened, decode=True)
    [error] = report.errors
    assert error.location.endswith(f"train.jsonl:{BAD + 1}")
    assert f"{BAD}.jpg: the file is truncated" in error.message
    assert report.sizes.indices.tolist() == [n for n in range(9) if n != BAD]


def test_what_was_decoded_once_is_not_decoded_again_wherever_it_lies(tmp_path):
    dataset, preprocessor = open_records(write_records(tmp_path / "a"))
    write_records(tmp_path / "b", bad=())
    first = DecodeCheck(preprocessor.media_loader)
    for number, record in enumerate(dataset):
        if number != BAD:
            first.check(preprocessor.parse(record), record.file)
    first.save()
    again = DecodeCheck(preprocessor.media_loader)
    for record in open_records(tmp_path / "b" / "train.jsonl")[0]:
        again.check(preprocessor.parse(record), record.file)
    assert (first.num_decoded, again.num_media, again.num_decoded) == (8, 9, 1)


def test_the_check_remembers_what_it_decoded_even_if_it_is_interrupted(tmp_path, monkeypatch):
    opened = open_records(write_records(tmp_path, bad=()))
    steps = validate_dataset(*opened, decode=True)
    next(steps)
    steps.close()
    known = len(DecodeCheck(opened[1].media_loader).known)
    assert known > 0
    assert validation_report(*opened, decode=True).errors == ()
    decoded = []
    monkeypatch.setattr(MediaLoader, "decode", lambda _, record, __: decoded.append(record))
    assert validation_report(*opened, decode=True).decoded == 9
    assert decoded == []


def test_a_damaged_memory_of_the_check_counts_as_empty(tmp_path):
    dataset, preprocessor = open_records(write_records(tmp_path, 2, bad=()))
    check = DecodeCheck(preprocessor.media_loader)
    check.check(preprocessor.parse(dataset[0]), dataset.files[0])
    check.save()
    assert len(DecodeCheck(preprocessor.media_loader).known) == 1
    content = bytearray(check.path.read_bytes())
    content[-1] ^= 1
    check.path.write_bytes(content)
    assert DecodeCheck(preprocessor.media_loader).known == set()


def test_the_deep_check_reads_videos(tmp_path):
    video = tmp_path / "v.mp4"
    video.write_bytes(make_video(count=12))
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-400])
    path = write_jsonl(
        tmp_path / "r.jsonl", [chat_record("?", video=name) for name in ("v.mp4", "cut.mp4")]
    )
    report = validation_report(*open_records(path), decode=True)
    assert [error.location for error in report.errors] == [f"{path}:2"]


def test_a_bad_record_is_left_out_of_its_batch(tmp_path):
    settings = {"batch_size": 3, "multi_image_tiles": "each"}
    batches = open_batches(write_records(tmp_path), **settings)
    found = [*batches.iter_once()]
    assert [len(batch.locations) for batch in found] == [3, 2, 3]
    [left_out] = found[1].left_out
    assert left_out.location.endswith(f":{BAD + 1}")
    assert "the file is truncated" in left_out.error
    whole = open_batches(write_records(tmp_path / "whole", bad=()), **settings)
    for ours, theirs in zip(found[::2], [*whole.iter_once()][::2], strict=True):
        assert np.array_equal(ours.input_ids, theirs.input_ids)


def test_a_batch_of_bad_records_alone_is_the_next_good_one(tmp_path):
    batches = open_batches(write_records(tmp_path, bad=(4, 5)), batch_size=1)
    found = [*batches.iter_once()]
    lines = [[int(place.rpartition(":")[2]) for place in names] for names in locations(found)]
    assert lines == [[1], [2], [3], [4], [7], [7], [7], [8], [9]]
    again = [*batches.iter_epoch(0, start=3)]
    assert locations(again) == locations([*batches.iter_epoch(0)][3:])


def test_a_data_set_without_any_readable_record_ends(tmp_path):
    batches = open_batches(write_records(tmp_path, 3, bad=(0, 1, 2)), batch_size=1)
    with pytest.raises(DataError, match=r"train.jsonl:1: .*; so are those after it"):
        next(batches.iter_once())


def test_stop_raises_at_the_first_bad_record(tmp_path):
    batches = open_batches(write_records(tmp_path), on_bad_row="stop")
    with pytest.raises(DataError, match=rf"train.jsonl:{BAD + 1}: cannot read"):
        [*batches.iter_once()]


def test_more_bad_records_than_allowed_end_the_run():
    config = small_config(__import__("pathlib").Path("x"))
    assert tolerated_bad_records(config, 300, 1) == 10
    assert tolerated_bad_records(config, 30_000, 2) == 150
    assert tolerated_bad_records(replace(config, max_bad_rows=0.5), 300, 1) == 150
    from internvl3_mlx.training.batch import BadRecord

    bad = BadRecords(limit=2)
    same = BadRecord("a:1", "cut")
    for _ in range(5):
        bad.add([same, BadRecord("a:2", "cut")])
    assert len(bad.take_unreported()) == 2
    assert bad.take_unreported() == []
    with pytest.raises(DataError, match="a:3: gone; that is 3 records that cannot be read"):
        bad.add([BadRecord("a:3", "gone")])


def run(config, **options):
    return [*train(config, **options)]


def test_a_run_leaves_a_bad_record_out_names_it_and_resumes_to_the_bit(tmp_path):
    write_records(tmp_path / "data")
    config = small_config(tmp_path, epochs=2, save_every=1)
    events = run(config)
    [left_out] = select(events, RecordLeftOut)
    assert left_out.location.endswith(f"train.jsonl:{BAD + 1}")
    assert (left_out.total, select(events, TrainEnd)[0].left_out) == (1, 1)
    whole = small_session(tmp_path, epochs=2)
    updates = len(select(events, UpdateDone))
    assert updates == whole.state.total_updates

    stopped = replace(config, adapter_path=str(tmp_path / "again"))
    counter = iter(range(100))
    first = run(stopped, stop_requested=lambda: next(counter) >= 5)
    second = run(stopped, resume=True)
    assert len(select(first, UpdateDone)) + len(select(second, UpdateDone)) == updates
    assert select(second, TrainEnd)[0].left_out == 1
    assert len(select(first + second, RecordLeftOut)) == 1
    name = "state.safetensors"
    ours, theirs = (list_checkpoints(tmp_path / folder)[-1] / name for folder in ("run", "again"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_check_data_decodes_when_asked(tmp_path):
    write_records(tmp_path / "data")
    config = small_config(tmp_path)
    assert finish(check_data(config)).train.report.errors == ()
    assert len(finish(check_data(config, decode=True)).train.report.errors) == 1


@pytest.mark.parametrize("key", ["image", "video"])
@pytest.mark.parametrize("name", ["a, b" * 2000, "a\0b.png", "x" * 300 + ".png"])
def test_a_name_that_no_file_can_have_is_told_in_one_line(tmp_path, key, name):
    path = write_jsonl(tmp_path / "r.jsonl", [chat_record("?", **{key: name})])
    [error] = validation_report(*open_records(path), decode=True).errors
    assert "no file at" in error.message
    assert len(error.message) < 700
    assert "\n" not in error.message
