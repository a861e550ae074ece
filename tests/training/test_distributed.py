"""Several processes train one model: they find what one finds with all their rows in one batch."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures.train_sessions import small_config, small_session, write_data

from internvl3_mlx.training.config_file import write_config_file
from internvl3_mlx.training.distributed import SINGLE_PROCESS, ProcessGroup, init_distributed
from internvl3_mlx.training.trainer import make_updates

PATIENCE_S = 240
LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # what mlx.launch runs
# what each rank runs: two updates, then its weights and figures in a file of its own
RANK = """
import sys, json
from itertools import islice
from pathlib import Path
import mlx.core as mx
from internvl3_mlx.training.distributed import connect
from internvl3_mlx.training.setup import look_around
from internvl3_mlx.training.config_file import build_recipe
from internvl3_mlx.training.session import small_session
from internvl3_mlx.training.trainer import train
from internvl3_mlx.training.evaluate import validate
from internvl3_mlx.training.session import resume
from internvl3_mlx.training.checkpoint import save_state
ranks = connect()
folder = Path(sys.argv[1])
own = {"adapter_path": str(folder / f"run{ranks.rank}")}  # as on two machines
ground = look_around(build_recipe(own, folder / "recipe.yaml"), lambda _: None, lambda *_: None)
session = small_session(ground, ranks)
places, works = [], session.left()
def noted():
    for work in works:
        places.extend(work.batch.locations)
        yield work
steps = [*islice(train(session.learner, noted()), 2)]
loss, _ = validate(session.learner, session.valid())
mine = folder / f"rank{ranks.rank}.safetensors"
mx.save_safetensors(str(mine), session.learner.weights)
if ranks.writes:
    save_state(session.learner, session.folder, session.progress)
again = small_session(ground, ranks)
resume(again, accept_changes=False)
held, now = session.learner.weights, again.learner.weights
same = all(mx.array_equal(w, now[name]).item() for name, w in held.items())
told = {
    "size": ranks.size, "writes": ranks.writes, "places": places, "val_loss": loss,
    "losses": [step.loss for step in steps], "tokens": [step.tokens for step in steps],
    "figures": steps[-1].figures, "shift": session.state.objective_state.shift.item(),
    "resumed": same and again.learner.optimizer.step.item() == again.learner.update == 2,
    "agree": [ranks.agree(ranks.rank == 1), ranks.agree(False)],
}
(folder / f"rank{ranks.rank}.json").write_text(json.dumps(told))
print("RANK", ranks.rank, "DONE", flush=True)
"""


def launched(folder: Path) -> list[dict]:
    """Run two ranks over the ring on loopback; its exit code says nothing, their words do."""
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
    write_config_file(small_config(tmp_path, **common), tmp_path / "recipe.yaml")
    ranks = launched(tmp_path)
    doubled = common | {"grad_accumulation_steps": 4}
    here = small_session(tmp_path, **doubled)
    steps = [*islice(make_updates(here.state, here.remaining_batches()), 2)]
    one, other = (loaded(tmp_path / f"rank{n}.safetensors") for n in range(2))
    alone = {name: np.array(w) for name, w in here.state.weights.items()}
    assert all(np.array_equal(one[name], other[name]) for name in alone)
    if settings is SFT:  # one process moves the reward shift twice as often: other updates
        assert max(float(np.abs(one[name] - alone[name]).max()) for name in alone) < 1e-7
        assert ranks[0]["losses"] == pytest.approx([step.loss for step in steps], rel=1e-6)
    else:
        assert ranks[0]["shift"] == ranks[1]["shift"] != 0
    assert max(float(np.abs(w).max()) for name, w in one.items() if "lora_B" in name) > 1e-6
    assert ranks[0]["tokens"] == [step.tokens for step in steps]
    assert not {*ranks[0]["places"]} & {*ranks[1]["places"]}
    for name in ("losses", "figures", "val_loss", "shift"):
        assert ranks[0][name] == ranks[1][name]
    assert [rank["writes"] for rank in ranks] == [True, False]
    assert [rank["resumed"] for rank in ranks] == [True, True]
    assert ranks[0]["agree"] == ranks[1]["agree"] == [True, False]


def test_one_process_is_alone_and_sums_nothing():
    assert init_distributed() is SINGLE_PROCESS
    tree = {"a": [mx.array([1.0])]}
    assert SINGLE_PROCESS.all_sum(tree) is tree
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.all_mean is None
    assert SINGLE_PROCESS.any_rank(True)
    assert SINGLE_PROCESS.sum_count(2**30 + 1) == 2**30 + 1
    assert SINGLE_PROCESS.mean_metrics({"a": [1.0, 3.0]}) == {"a": 2.0}


class OneOfTwo(ProcessGroup):
    """A rank beside one that sends what ``other`` holds, in order."""

    other = ([1.0, 2.0], [3.0, 5.0])

    def all_sum(self, tree):
        theirs = next(self.__dict__.setdefault("sent", iter(self.other)))
        return [tree[0] + mx.array(theirs)]


def test_a_rank_without_rows_holds_nobody_up():
    assert OneOfTwo(0, 2).mean_metrics({"a": [1.0, 3.0], "b": [7.0]}) == {"a": 2.5, "b": 6.0}
    idle = OneOfTwo(1, 2)
    assert idle.mean_metrics({}) == {}
    assert next(idle.sent, None) is None  # it took part in both sums


def test_two_ranks_read_no_row_twice(tmp_path):
    write_data(tmp_path / "data", 9)
    corpus = small_session(tmp_path).setup.train_dataset
    own = [
        {place for batch in corpus.iter_epoch(0, rank=rank, ranks=2) for place in batch.locations}
        for rank in range(2)
    ]
    assert not own[0] & own[1]
    assert len(own[0]) == len(own[1]) == 4
