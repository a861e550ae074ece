"""Data-parallel training: two processes make the updates of one with twice the batch size."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures.train_sessions import small_config, small_session, write_data

from internvl3_mlx.distributed.process_group import SINGLE_PROCESS, ProcessGroup, init_distributed
from internvl3_mlx.training.config_file import write_config_file
from internvl3_mlx.training.trainer import make_updates

PATIENCE_S = 240
LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # what mlx.launch runs
# what each rank runs: two updates, then it writes its weights and metrics to its own files
RANK = """
import sys, json
from itertools import islice
from pathlib import Path
import mlx.core as mx
from internvl3_mlx.training.checkpoint import save_checkpoint
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.distributed.process_group import init_distributed
from internvl3_mlx.training.evaluate import evaluate_loss
from internvl3_mlx.training.session import open_train_session, resume_session
from internvl3_mlx.training.setup import prepare_run
from internvl3_mlx.training.trainer import make_updates
def finish(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
ranks = init_distributed()
folder = Path(sys.argv[1])
own = {"adapter_path": str(folder / f"run{ranks.rank}")}  # as on two machines
setup = finish(prepare_run(build_config(own, folder / "train_config.yaml")))
session = finish(open_train_session(setup, ranks))
locations = []
def recorded():
    for micro_batch in session.remaining_batches():
        locations.extend(micro_batch.batch.locations)
        yield micro_batch
updates = [*islice(make_updates(session.state, recorded()), 2)]
loss, _ = evaluate_loss(session.state, session.validation_batches())
mx.save_safetensors(str(folder / f"rank{ranks.rank}.safetensors"), session.state.weights)
if ranks.is_main:
    save_checkpoint(session.state, session.folder, session.progress)
again = finish(open_train_session(setup, ranks))
resume_session(again, accept_changes=False)
before, now = session.state.weights, again.state.weights
same = all(mx.array_equal(w, now[name]).item() for name, w in before.items())
result = {
    "is_main": ranks.is_main, "locations": locations, "val_loss": loss,
    "losses": [update.loss for update in updates],
    "tokens": [update.tokens for update in updates],
    "metrics": updates[-1].metrics, "shift": session.state.objective_state.shift.item(),
    "resumed": same and again.state.optimizer.step.item() == again.state.update == 2,
    "any_rank": [ranks.any_rank(ranks.rank == 1), ranks.any_rank(False)],
}
(folder / f"rank{ranks.rank}.json").write_text(json.dumps(result))
print("RANK", ranks.rank, "DONE", flush=True)
"""


def launched(folder: Path) -> list[dict]:
    """Run two ranks over the ring on loopback; the launcher exits with 0 even if a rank fails."""
    (folder / "rank.py").write_text(RANK)
    launch = [sys.executable, "-c", LAUNCH, "-n", "2", "--backend", "ring", "--"]
    done = subprocess.run(
        [*launch, sys.executable, "rank.py", str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "RANK 0 DONE" in told, told[-3000:]
    assert "RANK 1 DONE" in told, told[-3000:]
    return [json.loads((folder / f"rank{n}.json").read_text()) for n in range(2)]


def loaded(path):
    return {name: np.array(w) for name, w in mx.load(str(path)).items()}


SFT = {"batch_size": 2, "grad_accumulation_steps": 2, "loss_reduction": "square"}
MPO = {"batch_size": 1, "grad_accumulation_steps": 2, "method": "mpo"}


@pytest.mark.parametrize("settings", [SFT, MPO], ids=["sft", "mpo"])
def test_two_processes_make_the_updates_of_one_with_twice_the_batch(tmp_path, settings):
    write_data(tmp_path / "data", 17, 3, pairs="method" in settings)
    common = {**settings, "lora_dropout": 0, "grouping": False, "iters": 2, "optimizer": "sgd"}
    write_config_file(small_config(tmp_path, **common), tmp_path / "train_config.yaml")
    ranks = launched(tmp_path)
    doubled = common | {"grad_accumulation_steps": 4}
    here = small_session(tmp_path, **doubled)
    steps = [*islice(make_updates(here.state, here.remaining_batches()), 2)]
    one, other = (loaded(tmp_path / f"rank{n}.safetensors") for n in range(2))
    alone = {name: np.array(w) for name, w in here.state.weights.items()}
    assert all(np.array_equal(one[name], other[name]) for name in alone)
    if settings is SFT:  # for MPO, one process updates the reward shift twice as often
        assert max(float(np.abs(one[name] - alone[name]).max()) for name in alone) < 1e-7
        assert ranks[0]["losses"] == pytest.approx([step.loss for step in steps], rel=1e-6)
    else:
        assert ranks[0]["shift"] == ranks[1]["shift"] != 0
    assert max(float(np.abs(w).max()) for name, w in one.items() if "lora_B" in name) > 1e-6
    assert ranks[0]["tokens"] == [step.tokens for step in steps]
    assert not {*ranks[0]["locations"]} & {*ranks[1]["locations"]}
    for name in ("losses", "metrics", "val_loss", "shift"):
        assert ranks[0][name] == ranks[1][name]
    assert [rank["is_main"] for rank in ranks] == [True, False]
    assert [rank["resumed"] for rank in ranks] == [True, True]
    assert ranks[0]["any_rank"] == ranks[1]["any_rank"] == [True, False]


def test_a_single_process_sums_nothing():
    assert init_distributed() is SINGLE_PROCESS
    tree = {"a": [mx.array([1.0])]}
    assert SINGLE_PROCESS.all_sum(tree) is tree
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.all_mean is None
    assert SINGLE_PROCESS.any_rank(True)
    assert SINGLE_PROCESS.sum_count(2**30 + 1) == 2**30 + 1
    assert SINGLE_PROCESS.mean_metrics({"a": [1.0, 3.0]}) == {"a": 2.0}


class OneOfTwo(ProcessGroup):
    """One of two ranks; the other one sends the values of ``other``, in order."""

    other = ([1.0, 2.0], [3.0, 5.0])

    def all_sum(self, tree):
        theirs = next(self.__dict__.setdefault("sent", iter(self.other)))
        return [tree[0] + mx.array(theirs)]


def test_a_rank_without_batches_does_not_block_the_others():
    assert OneOfTwo(0, 2).mean_metrics({"a": [1.0, 3.0], "b": [7.0]}) == {"a": 2.5, "b": 6.0}
    idle = OneOfTwo(1, 2)
    assert idle.mean_metrics({}) == {}
    assert next(idle.sent, None) is None  # it took part in both sums


def test_two_ranks_read_different_records(tmp_path):
    write_data(tmp_path / "data", 9)
    corpus = small_session(tmp_path).setup.train_dataset
    own = [
        {place for batch in corpus.iter_epoch(0, rank=rank, ranks=2) for place in batch.locations}
        for rank in range(2)
    ]
    assert not own[0] & own[1]
    assert len(own[0]) == len(own[1]) == 4
