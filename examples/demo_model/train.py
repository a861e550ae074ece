"""Train the demo model in stages, resumable exactly.

Stage ``see`` trains the tower and the projector on dense labels, ``ask`` trains everything on
questions, ``widen`` goes on with long and large pictures,
``broaden`` with drawings of many styles, ``read`` with writing, and ``settle`` brings all of it
together::

    python -m examples.demo_model.train see --run runs/see --steps 3000
    python -m examples.demo_model.train ask --run runs/ask --start runs/see --steps 9000
    python -m examples.demo_model.train widen --run runs/wide --start runs/ask --steps 2000

``--start`` takes the folder of the stage before, or a converted checkpoint such as
``internvl3_mlx/demo``.

Run the same command again to go on. The plan in ``RUN/plan.json`` is read every 20 steps: edit
``steps`` and ``decay_from`` there to let a running training end sooner or later.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from examples.demo_model.batches import Batch, BatchMaker
from examples.demo_model.broad import Material
from examples.demo_model.losses import SeeingHeads, answer_loss, to_device
from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.optim import Muon, rate, split
from examples.demo_model.published import published_weights
from examples.demo_model.rows import RowBuilder
from examples.demo_model.stages import STAGES
from examples.demo_model.tokenizer import open_tokenizer
from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.records.json_values import write_json

WARMUP = 100
CLIP = 2.0  # largest gradient norm of what AdamW trains
SAVE_SECONDS, LOG_STEPS, PLAN_STEPS = 180, 20, 20


@dataclass(frozen=True)
class Job:
    """Say what to train and where."""

    stage: str
    run: Path
    start: Path | None
    device: str
    workers: int
    pictures: int
    drawings: Path | None = None
    typefaces: Path | None = None


def main() -> None:
    """Parse the command line and start one process per worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run", type=Path, required=True, help="folder of this training's state")
    parser.add_argument("--start", type=Path, help="stage before, or a converted checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share the work (cpu)"
    )
    parser.add_argument(
        "--pictures", type=int, default=32, help="single-tile pictures per worker and step"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--drawings", type=Path, help="what drawings.py rendered (from broaden on)")
    parser.add_argument(
        "--typefaces", type=Path, help="what typefaces.py rendered (from broaden on)"
    )
    options = vars(parser.parse_args())
    steps = options.pop("steps")
    job = Job(**options)
    job.run.mkdir(parents=True, exist_ok=True)
    if not (job.run / "plan.json").exists():
        plan = {"steps": steps, "decay_from": int(STAGES[job.stage].plateau * steps)}
        write_json(job.run / "plan.json", plan)
    source = (job.start or job.run) / "tokenizer.json"
    open_tokenizer(source).save(str(job.run / "tokenizer.json"))
    torch.multiprocessing.spawn(work, (job, time.time()), nprocs=job.workers)


def work(rank: int, job: Job, began: float) -> None:
    """Train as one of the workers."""
    torch.set_num_threads(1 if job.workers > 1 else torch.get_num_threads())
    torch.set_flush_denormal(True)
    if job.workers > 1:
        meeting = f"file://{(job.run / f'meeting-{began}').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.workers)
    trainer = Trainer(job, rank)
    trainer.load()
    clock, saved, recent = time.time(), time.time(), []
    for step, figures in trainer.steps():
        recent.append(figures)
        if rank == 0 and step % LOG_STEPS == 0:
            mean = torch.stack(recent).mean(0).tolist()
            pace = len(recent) / (time.time() - clock)
            log(
                job.run,
                step,
                dict(zip(("loss", "seeing", "answers", "right"), mean, strict=True)),
                pace,
            )
            clock, recent = time.time(), []
        if rank == 0 and time.time() - saved > SAVE_SECONDS:
            trainer.save(step)
            saved = time.time()
    if rank == 0:
        trainer.save(trainer.done)


def log(run: Path, step: int, figures: dict[str, float], pace: float) -> None:
    """Append one line of figures to the run's log and show it."""
    line = {
        "step": step,
        **{name: round(value, 4) for name, value in figures.items()},
        "steps_per_s": round(pace, 2),
    }
    print(time.strftime("%H:%M:%S"), json.dumps(line), flush=True)
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Trainer:
    """Hold the model, the optimizers and the count of finished steps: all that a resumed run
    needs."""

    def __init__(self, job: Job, rank: int):
        self.job, self.stage, self.device = job, STAGES[job.stage], torch.device(job.device)
        tokenizer = open_tokenizer(job.run / "tokenizer.json")
        config = DemoConfig(tokenizer.get_vocab_size())
        torch.manual_seed(0)
        self.model = InternVL(config).to(self.device)
        self.heads = SeeingHeads(config, tokenizer).to(self.device)
        rows = RowBuilder(tokenizer, config.tokens_per_tile)
        self.image_id = rows.image_id
        self.batches = BatchMaker(
            None if job.stage == "see" else rows,
            self.stage.lessons,
            rank=rank,
            pictures=job.pictures,
            material=Material(job.drawings, job.typefaces) if job.drawings else None,
        )
        matrices, rest = split({"model": self.model, "heads": self.heads}, self.stage.tower)
        self.half = fast_bfloat16(self.device)
        self.muon = Muon(matrices, self.stage.muon, half=self.half)
        self.adam = torch.optim.AdamW(rest, self.stage.adam, betas=(0.9, 0.98), weight_decay=0.01)
        self.clipped = [parameter for group in rest for parameter in group["params"]]
        self.owned = [*self.model.parameters(), *self.heads.parameters()]
        mean, std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.done = 0

    def parts(self) -> dict:
        """Name what a checkpoint keeps."""
        return {"model": self.model, "heads": self.heads, "muon": self.muon, "adam": self.adam}

    def save(self, step: int) -> None:
        """Write the state beside the old one, then put it in its place."""
        state = {name: part.state_dict() for name, part in self.parts().items()} | {"done": step}
        torch.save(state, self.job.run / "state.new")
        os.replace(self.job.run / "state.new", self.job.run / "state.pt")

    def load(self) -> None:
        """Go on from this run's state, or start from the weights of the stage before."""
        own = self.job.run / "state.pt"
        if own.exists():
            state = torch.load(own, weights_only=True, map_location=self.device)
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.done = state["done"]
        elif self.job.start and not (self.job.start / "state.pt").exists():
            self.model.load_state_dict(published_weights(self.job.start))
            self.heads.blank()
        elif self.job.start:
            state = torch.load(
                self.job.start / "state.pt", weights_only=True, map_location=self.device
            )
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Train until the plan says stop; yield the count of finished steps and the step's
        figures."""
        plan = self.plan()
        while True:
            if self.done % PLAN_STEPS == 0:
                plan = self.plan()
            if self.done >= plan["steps"]:
                return
            factor = rate(
                self.done, warmup=WARMUP, decay_from=plan["decay_from"], steps=plan["steps"]
            )
            batch = self.batches.make(self.done, many_tiles=plan.get("many_tiles", 1.0))
            figures = self.update(batch, factor)
            self.done += 1
            yield self.done, figures

    def plan(self) -> dict:
        """Read the plan; the first worker reads for all, so that an edit reaches them at the same
        step."""
        plan = [json.loads((self.job.run / "plan.json").read_text())]
        if self.job.workers > 1:
            dist.broadcast_object_list(plan)
        return plan[0]

    def update(self, batch: Batch, factor: float) -> Tensor:
        """Take one step; give (loss, dense loss, answer loss, share of right answer tokens)."""
        for optimizer, base in ((self.muon, self.stage.muon), (self.adam, self.stage.adam)):
            for group in optimizer.param_groups:
                group["lr"] = base * group["share"] * factor
        seeing, answers, right = self.losses(batch)
        loss = self.stage.seeing * seeing + answers
        loss.backward()
        if self.job.workers > 1:
            self.share_gradients()
        torch.nn.utils.clip_grad_norm_(self.clipped, CLIP)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([loss, seeing, answers, right]).detach()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Score a batch in bfloat16 products; norms, softmax of labels and positions stay in
        float32."""
        pixels = torch.from_numpy(batch.tiles).to(self.device).flatten(0, 1).permute(0, 3, 1, 2)
        zero = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            patches, visual = self.model.see(pixels * self.scale - self.shift)
            answers, right = zero, zero
            if batch.rows is not None:
                answers, right = answer_loss(
                    self.model, visual, batch.rows, self.image_id, self.device
                )
        embedding = self.model.language_model.model.embed_tokens.weight
        seeing = self.heads(
            patches.float(), visual.float(), embedding, to_device(batch.labels, self.device)
        )
        return seeing, answers, right

    def share_gradients(self) -> None:
        """Average gradients over the workers."""
        owned = [p for p in self.owned if p.grad is not None]
        flat = torch.cat([p.grad.reshape(-1) for p in owned])
        dist.all_reduce(flat)
        for p, part in zip(
            owned, (flat / self.job.workers).split([p.numel() for p in owned]), strict=True
        ):
            p.grad = part.view_as(p)


def fast_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 products are fast: without AVX-512 BF16 they take 50 times as long."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


if __name__ == "__main__":
    main()
