"""What each rank runs: updates of adapters on a model that is divided among all ranks.

A program of its own: ``test_sharded_training`` launches it, and runs the same jobs in one process.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.distributed.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    init_distributed,
)
from internvl3_mlx.training.checkpoint import save_checkpoint
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.evaluate import evaluate_loss
from internvl3_mlx.training.export import write_adapter_files
from internvl3_mlx.training.run import plan_run
from internvl3_mlx.training.session import (
    TrainSession,
    describe_plan,
    open_train_session,
    resume_session,
)
from internvl3_mlx.training.setup import prepare_run
from internvl3_mlx.training.trainer import make_updates


def finish(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def run(job: dict[str, Any], ranks: ProcessGroup) -> dict[str, np.ndarray]:
    """Make updates, from the start or from a checkpoint, and save what came of them."""
    config = build_config({**job["settings"], "tensor_parallel": ranks.size})
    session: TrainSession = finish(open_train_session(finish(prepare_run(config)), ranks))
    if job.get("resume"):
        resume_session(session, accept_changes=False)
    plan = describe_plan(session) if ranks.size == 1 else plan_run(session)  # cost is None
    wanted = job["updates"] - session.state.update
    done = [*islice(make_updates(session.state, session.remaining_batches()), wanted)]
    if ranks.is_main and job.get("save"):
        save_checkpoint(session.state, session.folder, session.progress)
        write_adapter_files(session, session.folder)
    loss, _ = evaluate_loss(session.state, session.validation_batches())
    weights = {name: np.array(x) for name, x in session.state.weights.items()}
    return weights | {
        "counts": np.array([plan.trainable_parameters, plan.total_parameters]),
        "estimated": np.array(int(plan.cost is not None)),
        "loss": np.array([update.loss for update in done]),
        "norm": np.array([update.grad_norm for update in done]),
        "tokens": np.array([update.tokens for update in done]),
        "shift": np.array(session.state.objective_state.shift),
        "val_loss": np.array(loss),
    }


def run_jobs(
    jobs: dict[str, dict[str, Any]], ranks: ProcessGroup = SINGLE_PROCESS
) -> dict[str, np.ndarray]:
    """Run jobs by name and return their results as ``name/result``."""
    return {
        f"{name}/{key}": value
        for name, job in jobs.items()
        for key, value in run(job, ranks).items()
    }


def main(folder: Path) -> None:
    ranks = init_distributed()
    jobs = json.loads((folder / "jobs.json").read_text())
    np.savez(folder / f"rank{ranks.rank}.npz", **run_jobs(jobs, ranks))
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=ranks.stream))  # all have written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
