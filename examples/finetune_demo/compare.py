"""Compare methods of training, and best-of-8 without any, on the question that the demo half knows.

    python -m examples.finetune_demo.compare pairs

``pairs`` is what ``pairs.py`` wrote. Every method sees the same pictures and questions: SFT the
right answers, the preferences a right and a wrong answer to each, GRPO its own answers and which of
them are right. What was measured before is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import mean

from examples.best_of_demo.candidates import candidates, question_seed
from examples.finetune_demo.measure import LONGEST, asked, read_rows
from internvl3_mlx import VLM, load
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.test_time_scaling.vote import first_best, vote_shares

# Name -> recipe and what is set beside it.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SFT: the right answers alone": ("preference", ("--dpo-weight", "0", "--bco-weight", "0")),
    "MPO": ("preference", ()),
    "preferences alone": ("preference", ("--sft-weight", "0")),
    "GRPO": ("rewards", ()),
}
CANDIDATES = 8
BEST_OF = {
    "best of 8, majority": lambda texts, _: vote_shares(texts),
    "best of 8, mean log-probability": lambda _, log_probs: log_probs,
}


@dataclass(frozen=True)
class Run:
    """The share of right answers after a method with one seed. cpu: seconds it trained."""

    method: str
    seed: int
    right: float
    cpu: float = 0.0


def main() -> None:
    """Train and measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what pairs.py wrote")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = []
    for run in measured(options.folder, options.model, options.seeds):
        print(json.dumps(asdict(run)), flush=True)
        runs.append(run)
    print(table(runs))


def measured(folder: Path, model: str, seeds: int) -> Iterator[Run]:
    """Yield all runs; those in ``runs.jsonl`` as they stand there."""
    log = folder / "runs.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    known = {(run.method, run.seed): run for run in (Run(**json.loads(line)) for line in lines)}
    for method, seed in plan(seeds):
        if (method, seed) in known:
            yield known[method, seed]
            continue
        for run in carry_out(folder, model, method, seed):
            with log.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            known[run.method, run.seed] = run
        yield known[method, seed]


def plan(seeds: int) -> Iterator[tuple[str, int]]:
    """Yield each method with each seed; the demo itself answers greedily, so it has one."""
    yield "the demo", 0
    for method in (*METHODS, *BEST_OF, "any of 8 right"):
        yield from ((method, seed) for seed in range(seeds))


def carry_out(folder: Path, model: str, method: str, seed: int) -> Iterator[Run]:
    """Train and measure a method, or choose among candidates in every way at once."""
    fresh = folder / "fresh.jsonl"
    if method not in METHODS and method != "the demo":
        yield from best_of(load(model), fresh, seed)
        return
    cpu, adapter = 0.0, None
    if method in METHODS:
        recipe, settings = METHODS[method]
        adapter = folder / "runs" / f"{recipe}{''.join(settings).replace('--', '-')}-{seed}"
        cpu = train(folder, model, recipe, [*settings, "--seed", str(seed)], adapter)
    vlm = load(model, adapter=adapter)
    yield Run(method, seed, mean(said == wanted for _, wanted, said in asked(vlm, fresh)), cpu)


def train(folder: Path, model: str, recipe: str, settings: list[str], adapter: Path) -> float:
    """Train by a recipe of this folder; return its processor seconds."""
    data = folder / ("questions.jsonl" if recipe == "rewards" else "train.jsonl")
    config = Path(__file__).with_name(f"{recipe}.yaml")
    before = getrusage(RUSAGE_CHILDREN)
    command = ["-m", "internvl3_mlx", "train", "-c", config, "--model", model, "--data", data]
    command += ["--adapter-path", adapter, *settings]
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def best_of(vlm: VLM, fresh: Path, seed: int) -> Iterator[Run]:
    """Write eight candidates to each question; yield what every way of choosing makes of them."""
    right: dict[str, list[bool]] = {name: [] for name in (*BEST_OF, "any of 8 right")}
    questions = read_rows(fresh)
    for number, question in enumerate(questions):
        drawn = question_seed(seed, number, len(questions))
        config = GenerationConfig(temperature=1.0, max_tokens=LONGEST, seed=drawn)
        texts, log_probs = candidates(vlm, question.text, question.images, config, CANDIDATES)
        hits = [text == question.answer for text in texts]
        for name, score in BEST_OF.items():
            right[name].append(hits[first_best(score(texts, log_probs))])
        right["any of 8 right"].append(any(hits))
    yield from (Run(name, seed, mean(hits)) for name, hits in right.items())


def table(runs: list[Run]) -> str:
    """Lay out a row for each method: its seeds, their mean, and its processor seconds."""
    methods = dict.fromkeys(run.method for run in runs)
    found = {method: [run for run in runs if run.method == method] for method in methods}
    seeds = max(map(len, found.values()))
    lines = ["| | " + " | ".join(f"seed {n}" for n in range(seeds)) + " | mean | CPU seconds |"]
    lines.append("|---|" + "---:|" * (seeds + 2))
    for method, own in found.items():
        cells = [f"{run.right:.1%}" for run in own] if len(own) == seeds else [""] * seeds
        cpu = mean(run.cpu for run in own)
        cells += [f"{mean(run.right for run in own):.1%}", f"{cpu:.0f}" if cpu else ""]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
