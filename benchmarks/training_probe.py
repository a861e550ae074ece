"""One measured run of a trainer: ``python -m benchmarks.training_probe CASE SIDE FOLDER`` prints
its results as JSON. Both programs read the same samples in the same ids and pixels."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from benchmarks.sides import OURS

T = TypeVar("T")

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-12  # the work of an update without its effect, so that losses are comparable
MB = 1e6
EPOCHS = 2


@dataclass(frozen=True)
class UpdateTiming:
    """One update: processor and clock seconds, its loss, and the peak of MLX's memory in it."""

    cpu: float
    wall: float
    loss: float
    peak: int


def main(case: str, side: str, folder: str) -> None:
    rounds = [*RUNS[side](case, Path(folder))]
    rows = len(rounds) // EPOCHS
    first, later = rounds[1:rows], rounds[rows:]  # the very first step warms up
    figures: dict[str, float] = {
        "loss": mean(step.loss for step in later),
        "peak_mb": max(step.peak for step in later) / MB,
        "tokens": tokens(case, Path(folder)),
    }
    for name, part in (("first", first), ("later", later)):
        figures[f"{name}_cpu"] = median(step.cpu for step in part)
        figures[f"{name}_wall"] = median(step.wall for step in part)
    print(json.dumps(figures))


def row_files(folder: Path, case: str) -> Path:
    """Return the file of a case's samples, beside the checkpoint."""
    return folder.parent / f"{case.split()[0]}.jsonl"


def ours(case: str, folder: Path) -> Iterator[UpdateTiming]:
    """Train by our own loop, as ``internvl3 train`` does; nothing is kept from an earlier run."""
    os.environ["INTERNVL3_CACHE"] = tempfile.mkdtemp()
    from internvl3_mlx.training.config_file import build_config
    from internvl3_mlx.training.session import open_train_session
    from internvl3_mlx.training.setup import prepare_run
    from internvl3_mlx.training.trainer import make_updates

    given = {
        "model": str(folder),
        "data": str(row_files(folder, case)),
        "method": case.split()[0],
        "epochs": float(EPOCHS),
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "cache_features": False,
        "adapter_path": tempfile.mkdtemp(),
        "cache_reference": case == "mpo cached",
    }
    setup = finish(prepare_run(build_config(given, None)))
    session = finish(open_train_session(setup))
    return timed(step.loss for step in make_updates(session.state, session.remaining_batches()))


def finish(generator: Generator[object, None, T]) -> T:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            result: T = end.value
            return result


def timed(losses: Iterator[float]) -> Iterator[UpdateTiming]:
    """Time each update of a trainer that yields losses."""
    clock = UpdateTimer()
    for loss in losses:
        yield clock.round(loss)


class UpdateTimer:
    """Times one update after another."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        mx.reset_peak_memory()

    def round(self, loss: float) -> UpdateTiming:
        """Return the time and memory since the last call."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        done = UpdateTiming(cpu, wall, loss, mx.get_peak_memory())
        self.start()
        return done


def peer(case: str, folder: Path) -> Iterator[UpdateTiming]:
    """Train with mlx-vlm: its SFT task, or its DPO with a second model as the reference."""
    from mlx_vlm import load
    from mlx_vlm.trainer.common.model import prepare_model_for_training

    model, _ = load(str(folder))
    model = prepare_model_for_training(
        model, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0, verbose=False
    )
    rows = peer_rows(case, folder)
    call, callback = {"sft": train_peer, "mpo": prefer_peer}[case.split()[0]], Callback()
    call(model, rows, folder, callback)
    return iter(callback.rounds)


class Callback:
    """The callback that mlx-vlm calls after each update."""

    def __init__(self) -> None:
        self.clock, self.rounds = UpdateTimer(), list[UpdateTiming]()

    def on_train_loss_report(self, callback: dict[str, Any]) -> None:
        self.rounds.append(self.clock.round(float(callback["train_loss"])))

    def on_val_loss_report(self, callback: dict[str, Any]) -> None:
        """There is no validation."""


def train_peer(model: Any, rows: list[Any], folder: Path, callback: Callback) -> None:
    import mlx.optimizers as optim
    from mlx_vlm.trainer.vlm.config import VLMTrainingArgs
    from mlx_vlm.trainer.vlm.sft.runtime import train_vlm

    args = VLMTrainingArgs(**settings(rows), train_on_completions=True)
    train_vlm(
        model, optim.AdamW(LEARNING_RATE), rows, None, args, training_callback=callback, seed=0
    )


def prefer_peer(model: Any, rows: list[Any], folder: Path, callback: Callback) -> None:
    import mlx.optimizers as optim
    from mlx_vlm import load
    from mlx_vlm.trainer.vlm.dpo.trainer import DPOTrainingArgs, train_dpo

    reference, _ = load(str(folder))
    args = DPOTrainingArgs(**settings(rows))
    train_dpo(
        model,
        reference,
        optim.AdamW(LEARNING_RATE),
        rows,
        None,
        args,
        training_callback=callback,
        seed=0,
    )


def settings(rows: list[Any]) -> dict[str, Any]:
    """Return mlx-vlm's settings: as many updates of one sample each, no padding, nothing saved."""
    return {
        "batch_size": 1,
        "iters": EPOCHS * len(rows),
        "steps_per_report": 1,
        "steps_per_eval": None,
        "steps_per_save": 10**9,
        "max_seq_length": 10**5,
        "pad_to_multiple": 1,
        "adapter_file": str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    }


def peer_rows(case: str, folder: Path) -> list[Any]:
    """Return our ids and pixels for mlx-vlm, whose own prompt differs from InternVL3's."""
    from internvl3_mlx.training.data.preprocess import PreferencePair

    made = samples(case, folder)
    rows: list[Any] = []
    for one in made:
        if not isinstance(one, PreferencePair):
            rows.append(peer_row(one.input_ids, one.loss_mask, one.images))
            continue
        pair = {}
        for name, answer in (("chosen", one.chosen), ("rejected", one.rejected)):
            ids = np.concatenate([one.prompt.input_ids, answer])
            loss_mask = np.arange(len(ids)) >= len(one.prompt.input_ids)
            pair[name] = peer_row(ids, loss_mask, one.prompt.images)
        rows.append(pair)
    return rows


def peer_row(ids: np.ndarray, loss_mask: np.ndarray, images: Any) -> dict[str, mx.array]:
    from internvl3_mlx.images.tiling import normalize

    pixels = normalize(np.concatenate([image.tiles for image in images]))
    return {
        "input_ids": mx.array(ids),
        "attention_mask": mx.ones(len(ids), mx.int32),
        "completion_mask": mx.array(loss_mask.astype(np.int32)),
        "pixel_values": mx.array(pixels.transpose(0, 3, 1, 2)),
    }


def samples(case: str, folder: Path) -> list[Any]:
    """Build the samples or pairs of a case as our trainer reads them."""
    from internvl3_mlx.training.config import TrainConfig
    from internvl3_mlx.training.data.dataset import open_dataset
    from internvl3_mlx.training.data.preprocess import Preprocessor
    from internvl3_mlx.training.setup import load_processor

    maker = Preprocessor(load_processor(folder), TrainConfig(method=case.split()[0]))
    data = open_dataset(row_files(folder, case), config=maker.config)
    assert data is not None
    return [maker.build(entry) for entry in data]


def tokens(case: str, folder: Path) -> float:
    """Return the mean tokens per sample, counting the prompt of a pair once for each answer."""
    rows = samples(case, folder)
    if not case.startswith("mpo"):
        return mean(len(row.input_ids) for row in rows)
    return mean(2 * len(p.prompt.input_ids) + len(p.chosen) + len(p.rejected) for p in rows)


RUNS = {OURS: ours, "mlx-vlm": peer}

if __name__ == "__main__":
    main(*sys.argv[1:])
