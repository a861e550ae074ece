"""Records of a Hub dataset read by byte ranges: which, how often, in which order, what is held."""

import json
from io import BytesIO

import numpy as np
import pytest
from fixtures.image_files import noise
from fixtures.records import make_preprocessor
from fixtures.train_sessions import select, small_session, small_setup, write_data

from internvl3_mlx.adapters.adapter_files import ADAPTER_WEIGHTS
from internvl3_mlx.errors import DataError, DownloadError, UserError
from internvl3_mlx.records import streamed_parquet
from internvl3_mlx.records.streamed_parquet import HELD_GROUPS, RemoteFolder, RowGroupCache
from internvl3_mlx.training.checkpoint import state_arrays
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data import dataset as datasets
from internvl3_mlx.training.data.collate import batch_dataset
from internvl3_mlx.training.data.dataset import open_dataset, split_off_share
from internvl3_mlx.training.data.validate import validation_report
from internvl3_mlx.training.events import UpdateDone
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import resume_session

pyarrow = pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")
GROUP_ROWS, GROUPS = 5, 7  # of each file; the last row group is shorter
FILES = ("data/train-00000-of-00003", "data/train-00001-of-00003", "data/train-00002-of-00003")
ROWS = GROUP_ROWS * GROUPS - 2


def write_shard(path, name, rows):
    import pyarrow.parquet as pq

    image = BytesIO()
    noise(60, 40, 0).save(image, "PNG")
    records = [
        {
            "question": f"{name} row {n}?",
            "answer": "word " * (1 + n % 4),
            "image": {"bytes": image.getvalue(), "path": None},
        }
        for n in range(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=GROUP_ROWS)


class Remote:
    """A file system that counts what is opened, and may lose its network."""

    def __init__(self):
        self.filesystem = fsspec.filesystem("file")
        self.opened, self.failures = [], 0

    def find(self, root):
        return self.filesystem.find(root)

    def open(self, location, mode):
        self.opened.append(location)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the network is gone")
        return self.filesystem.open(location, mode)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    for name in FILES:
        write_shard(tmp_path / f"{name}.parquet", name[-14:-9], ROWS)
    write_shard(tmp_path / "data/validation-00000-of-00001.parquet", "valid", 6)
    found = Remote()
    folder = RemoteFolder(found, str(tmp_path), "c0ffee")
    monkeypatch.setattr(datasets, "hub_folder", lambda name: folder)
    monkeypatch.setattr(streamed_parquet, "RETRY_SECONDS", (0.0, 0.0))
    return found


def settings(**changes):
    return TrainConfig(**{"stream_records": 1000, "batch_size": 2, **changes})


def stream(split="train", name="owner/name", notify=lambda _: None, **changes):
    return open_dataset(name, split, config=settings(**changes), notify=notify)


def batched(name="owner/name", **changes):
    dataset = stream(name=name, **changes)
    preprocessor = make_preprocessor(**{"batch_size": 2, "stream_records": 1000, **changes})
    return batch_dataset(dataset, preprocessor, validation_report(dataset, preprocessor))


def cache_of(dataset) -> RowGroupCache:
    return dataset.files[0].source.cache


def test_every_record_is_read_as_from_the_files_themselves(remote, tmp_path):
    dataset = stream()
    assert len(dataset) == 3 * ROWS
    own = [r.value for name in FILES for r in open_dataset(tmp_path / f"{name}.parquet")]
    assert [record.value for record in dataset] == own
    assert dataset[ROWS].location == f"{tmp_path}/{FILES[1]}.parquet:1"
    assert len(stream("valid")) == 6
    assert stream("test") is None


def test_a_part_is_some_row_groups_of_as_few_files_as_hold_it(remote):
    notes = []
    dataset = stream(stream_records=13, notify=notes.append)
    assert len(dataset) == 13
    assert len({*remote.opened}) == 1  # the other files are not even opened
    assert "streaming 13 records of owner/name: 3 row groups in 1 of 3 files" in notes[0]
    numbers = [record.number for record in dataset]
    assert numbers == [record.number for record in stream(stream_records=13)]
    assert {*numbers} != {r.number for r in stream(stream_records=13, seed=6)}
    assert len(stream(name="owner/name:0.5", stream_records=26)) == 13
    assert len(stream(name="owner/name:2", stream_records=13)) == 26


@pytest.mark.parametrize("grouping", [False, True])
def test_an_epoch_reads_each_row_group_once_and_holds_few(remote, monkeypatch, grouping):
    batches = batched(grouping=grouping, batch_size=3)
    cache, held = cache_of(batches.dataset), []
    read_group = streamed_parquet.StreamedTable.read_group

    def read(table, group):
        held.append(sum(rows.num_rows for rows in cache.held.values()))
        return read_group(table, group)

    monkeypatch.setattr(streamed_parquet.StreamedTable, "read_group", read)
    cache.held.clear()
    before = cache.reads
    read_locations = [place for batch in batches.iter_epoch(1) for place in batch.locations]
    assert sorted(read_locations) == sorted(record.location for record in batches.dataset)
    assert cache.reads - before == 3 * GROUPS
    assert max(held) <= HELD_GROUPS * GROUP_ROWS
    assert len(cache.held) == HELD_GROUPS


def test_the_order_is_shuffled_and_depends_on_the_seed_alone(remote):
    first = [batch.locations for batch in batched().iter_epoch(0)]
    again = batched()
    assert [batch.locations for batch in again.iter_epoch(0)] == first
    assert [batch.locations for batch in again.iter_epoch(0, start=11)] == first[11:]
    assert [batch.locations for batch in again.iter_epoch(1)] != first
    opening = {place for locations in first[:5] for place in locations}
    assert len({place.rpartition(":")[0] for place in opening}) > 1  # of several files


def test_streams_and_files_are_joined(remote, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": f"{n}?", "answer": "a"}) + "\n" for n in [1, 2]))
    batches = batched(name=f"{own},owner/name:2", stream_records=9)
    read = [place for batch in batches.iter_epoch(0) for place in batch.locations]
    assert len(read) == 20
    assert sorted(read).count(f"{own}:1") == 1
    train, valid = split_off_share(batches.dataset, settings(valid_share=0.5))
    unique = {record.location for record in batches.dataset}
    assert {record.location for record in train} | {r.location for r in valid} == unique
    assert not {record.location for record in train} & {r.location for r in valid}


def test_a_short_failure_of_the_network_is_waited_for(remote):
    remote.failures = 2
    assert stream()[0].value["question"]


def test_a_lost_network_is_no_bad_record(remote):
    batches = batched()
    cache_of(batches.dataset).held.clear()
    following = batches.iter_epoch(0)
    next(following)
    remote.failures = 10**6
    with pytest.raises(DownloadError, match=r"after 3 attempts \(ConnectionError: the network"):
        list(following)
    remote.failures = 0
    whole = [batch.locations for batch in batched().iter_epoch(0)]
    assert [batch.locations for batch in batches.iter_epoch(0)] == whole


STREAMED = {
    "data": "owner/name", "stream_records": 30, "iters": 8, "batch_size": 3,
    "grad_accumulation_steps": 2, "lora_dropout": 0.1, "save_every": 2,
}  # fmt: skip


def lose_network(session, remote):
    events = run_session(session)
    next(events)
    remote.failures = 10**6
    with pytest.raises(DownloadError, match="go on with --resume"):
        list(events)
    remote.failures = 0


def request_stop(session, _):
    assert [*run_session(session, lambda: session.state.update == 4)][
        -1
    ].stop_cause == "interrupted"


def kill(session, _):
    """Leave a run as SIGKILL does, one update after its last checkpoint."""
    for event in run_session(session):
        if isinstance(event, UpdateDone) and event.update == 7:
            return


@pytest.mark.parametrize("interrupt", [lose_network, request_stop, kill])
def test_an_interrupted_stream_goes_on_to_the_bit(remote, tmp_path, interrupt):
    """Row groups are read again after the resume, and in the middle of an epoch."""
    whole = small_session(tmp_path / "one", **STREAMED)
    start = {name: np.array(x) for name, x in state_arrays(whole.state).items()}
    expected = [event.loss for event in select(run_session(whole), UpdateDone)]
    interrupt(small_session(tmp_path / "two", **STREAMED), remote)
    resumed = small_session(tmp_path / "two", **STREAMED)
    resume_session(resumed, accept_changes=False)
    done = resumed.state.update
    assert 0 < done < 8
    in_epoch = resumed.dataloader.train_dataset.count_batches(0, 1)
    assert resumed.state.micro_steps % in_epoch  # in the middle of an epoch
    losses = [event.loss for event in select(run_session(resumed), UpdateDone)]
    assert losses == expected[done:]
    one, two = (state_arrays(session.state) for session in (whole, resumed))
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer/") and name.endswith("/v") for name in one)
    assert [name for name in one if not np.array_equal(one[name], two[name])] == []
    weights = [name for name in one if name.startswith("weights/")]
    assert any(not np.array_equal(one[name], start[name]) for name in weights)
    adapters = [(tmp_path / run / "run" / ADAPTER_WEIGHTS).read_bytes() for run in ("one", "two")]
    assert adapters[0] == adapters[1]


def test_what_cannot_be_streamed_is_told(remote, tmp_path):
    write_data(tmp_path / "data")
    with pytest.raises(UserError, match=r"data sets on the Hub, and .* is on this disk; drop it"):
        small_setup(tmp_path, stream_records=5)
    with pytest.raises(UserError, match="packing and text_ratio need another"):
        settings(packing=True)
    (tmp_path / f"{FILES[0]}.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(DataError, match="as Parquet"):
        stream()
    for name in FILES:
        (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match="no Parquet files of the train split"):
        stream()


def test_rows_are_found_in_their_row_groups(remote):
    source = stream().files[0].source
    blocks = [source.block(n) for n in range(ROWS)]
    assert blocks == np.repeat(np.arange(GROUPS), GROUP_ROWS)[:ROWS].tolist()
