"""What each rank runs: models that are divided among all ranks, and what they compute.

A program of its own: ``test_sharded_models`` launches it, and runs the same jobs in one process.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.vlm import VLM


@dataclass(frozen=True, eq=False)
class RecordingShard(Shard):
    """Counts the bytes that a rank gives to each kind of message."""

    sent: list[tuple[str, int]] = field(default_factory=list)

    def sum(self, x: mx.array) -> mx.array:
        self.sent.append(("sum", x.nbytes))
        return super().sum(x)

    def gather_first(self, x: mx.array) -> mx.array:
        self.sent.append(("gather", x.nbytes))
        return super().gather_first(x)


def logits(job: dict[str, Any], shard: Shard) -> dict[str, np.ndarray]:
    """Compute the logits of a prompt with images, at V2PE's or plain positions, with an adapter."""
    adapter = Path(job["adapter"]) if job.get("adapter") else None
    model = load_local_model(Path(job["folder"]), adapter=adapter, shard=shard).model
    pixels = mx.array(np.load(job["pixels"])) if job.get("pixels") else None
    positions = mx.array(job["positions"]) if job.get("positions") else 0
    found = {"logits": np.array(model(mx.array([job["ids"]]), pixels, positions))}
    found["nbytes"] = np.array(
        sum(x.nbytes for name, x in tree_flatten(model.language_model.parameters()))
    )
    if model.has_router:
        routed = model.route_images(pixels)
        found |= {
            "features": np.array(routed.features),
            "probability": np.array(routed.probability),
        }
    return found


def talk(job: dict[str, Any], shard: Shard) -> dict[str, np.ndarray]:
    """Ask two questions in a conversation, the second one from the caches of the first."""
    loaded = load_local_model(Path(job["folder"]), shard=shard)
    os.environ["INTERNVL3_COMPILE"] = job.get("compile", "off")
    chat = VLM("tiny", loaded, loaded.template).conversation(**job["options"])
    found = {}
    for turn, (question, images) in enumerate(job["questions"]):
        *_, last = chat.stream(question, images, **job.get("first", {}) if not turn else {})
        found[f"tokens{turn}"] = np.array(last.answer.token_ids)
        found[f"compiled{turn}"] = np.array(last.answer.usage.compiled_tokens)
        found[f"cached{turn}"] = np.array(last.answer.usage.cached_tokens)
    return found


def messages(job: dict[str, Any], shard: Shard) -> dict[str, np.ndarray]:
    """Record what is sent for one token, and for some tiles."""
    recorded = RecordingShard(shard.rank, shard.size, shard.group, shard.stream)
    model = load_local_model(Path(job["folder"]), shard=recorded).model
    mx.eval(model(mx.array([[3]])))
    token = [*recorded.sent]
    recorded.sent.clear()
    mx.eval(model.get_image_features(mx.array(np.load(job["pixels"]))))
    kinds = {"token": token, "tiles": recorded.sent}
    return {
        f"{name}_{kind}": np.array([nbytes for k, nbytes in sent if k == kind])
        for name, sent in kinds.items()
        for kind in ("sum", "gather")
    }


def compiled(_: dict[str, Any], shard: Shard) -> dict[str, np.ndarray]:
    """Send from within a compiled function, as compiled decode steps do."""
    step = mx.compile(lambda x: shard.gather_last(shard.sum(shard.share(x) @ x.T)))
    return {"twice": np.array([step(mx.full((2, 2), shard.rank + n + 1.0)) for n in range(2)])}


JOBS = {"logits": logits, "talk": talk, "messages": messages, "compiled": compiled}


def run_jobs(jobs: dict[str, dict[str, Any]], shard: Shard = WHOLE) -> dict[str, np.ndarray]:
    """Run jobs by name and return their results as ``name/result``."""
    return {
        f"{name}/{key}": value
        for name, job in jobs.items()
        for key, value in JOBS[job["kind"]](job, shard).items()
    }


def main(folder: Path) -> None:
    group = mx.distributed.init()
    shard = Shard(group.rank(), group.size(), group, mx.new_stream(mx.cpu))
    jobs = json.loads((folder / "jobs.json").read_text())
    np.savez(folder / f"rank{shard.rank}.npz", **run_jobs(jobs, shard))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
