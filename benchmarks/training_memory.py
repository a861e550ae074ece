"""Predicted against measured memory and time of training: ``python -m benchmarks.training_memory``.

For each kind of run, the prediction made from shapes before the model is loaded, and the peak of
MLX's memory and the median seconds over a few updates. The demo model by default; each run in a
process of its own.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import Interpreter
from benchmarks.training import write_rows
from benchmarks.training_probe import finish

MB = 1e6
UPDATES = 4
COMMON: Mapping[str, Any] = {
    "batch_size": 1, "grad_accumulation_steps": 2, "max_tiles": 4, "cache_features": False,
    "lora_rank": 8, "learning_rate": 1e-12,
}  # fmt: skip
# label -> settings
CASES: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "LoRA, three samples at a time": {"batch_size": 3},
    "LoRA, gradient checkpointing": {"grad_checkpoint": True},
    "DoRA": {"dora": True},
    "LoRA on language and vision": {"lora_keys": "language,vision"},
    "language model in full": {"train": "language_model,mlp1"},
    "packing, 1,200 tokens": {"packing": True, "max_seq_length": 1200},
    "MPO": {"method": "mpo"},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.training_memory", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks" / "training-memory"
    parser.add_argument("--only", nargs="+", choices=[*CASES], help="measure only these")
    parser.add_argument("--model", default="demo", help="the model to train")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--work", type=Path, default=work, help="where checkpoints are written")
    parser.add_argument("--case", choices=[*CASES], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(run_case(args.work, args.model, CASES[args.case])))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    write_rows(args.work)
    found = {case: measure(case, args.work, args.model) for case in args.only or CASES}
    print(json.dumps(found) if args.json else table(found))


def measure(case: str, work: Path, model: str) -> dict[str, float]:
    """Predict and measure one case in a process of its own."""
    print(f"{case} ...", file=sys.stderr, flush=True)
    words = ("--case", case, "--work", str(work), "--model", model)
    out, _ = Interpreter().run("-m", "benchmarks.training_memory", *words)
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def run_case(work: Path, model: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the predicted and the measured peak in bytes, and the seconds of an update."""
    from internvl3_mlx.training.config_file import build_config
    from internvl3_mlx.training.cost_estimate import estimate_cost
    from internvl3_mlx.training.events import UpdateDone
    from internvl3_mlx.training.run import run_session
    from internvl3_mlx.training.session import open_train_session
    from internvl3_mlx.training.setup import prepare_run

    given = {
        **COMMON, **settings, "model": model, "iters": UPDATES,
        "data": str(work / f"{settings.get('method', 'sft')}.jsonl"),
        "adapter_path": tempfile.mkdtemp(),
    }  # fmt: skip
    setup = finish(prepare_run(build_config(given, None)))
    cost = estimate_cost(setup)
    session = finish(open_train_session(setup))
    done = [event for event in run_session(session) if isinstance(event, UpdateDone)]
    return {
        "predicted": cost.memory,
        "measured": done[-1].peak_memory,
        "predicted_seconds": cost.seconds,
        "measured_seconds": median(event.seconds for event in done[1:]),
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Format the results as Markdown."""
    lines = [
        "| run | predicted, MB | measured, MB | error | seconds, predicted | measured |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case, x in found.items():
        error = x["predicted"] / x["measured"] - 1
        lines.append(
            f"| {case} | {x['predicted'] / MB:,.0f} | {x['measured'] / MB:,.0f} | {error:+.0%} | "
            f"{x['predicted_seconds']:.1f} | {x['measured_seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
