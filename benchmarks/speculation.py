"""What speculative decoding costs and gains on real text: processor time and accepted drafts.

    python -m benchmarks.smollm2 --out internvl-smol
    python -m benchmarks.smollm2 --out smol-10 --layers 10
    internvl3 convert internvl-smol smol-4bit -q --q-bits 4
    python -m benchmarks.speculation internvl-smol --draft smol-10 smol-4bit

A text that is to be repeated gives prompt lookup much to find, a story next to nothing. Without
``--draft`` the draft model is the model itself: as dear as it is, nothing is to be drafted with it.
SmolLM2 has no smaller size in a package, so its first layers stand in for one, whose drafts are
poor, and its 4-bit weights for one whose drafts are good. A CPU computes with those in no less
time, so it does not draft with them; ``--cost 0.2`` counts what it would accept if it did. The ways
alternate.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from internvl3_mlx import VLM, load
from internvl3_mlx.generation import runner

PROMPTS = {
    "repeat": "Repeat this text exactly: The museum opens at nine in the morning and closes at "
    "five in the afternoon. Tickets cost eight euros for adults and four euros for children.",
    "story": "Write a short story about a lighthouse keeper and a storm.",
}
HEADER = "| prompt | way | ms a token | to plain | drafted | accepted | tokens a step |"


def main() -> None:
    """Print a table of all prompts and ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a real language model")
    parser.add_argument("--draft", nargs="+", default=[], help="draft models, folders")
    parser.add_argument("--cost", type=float, help="of a drafted token, in steps, as if it were so")
    parser.add_argument("--runs", type=int, default=3, help="medians are taken")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    if options.cost is not None:
        runner.draft_cost = lambda *_: options.cost
    vlm = load(options.model)
    ways: dict[str, dict[str, Any]] = {"plain": {}, "lookup": {"lookup": True}}
    for draft in options.draft or [vlm]:
        vlm.load_draft_model(draft)
        ways[f"drafts of {Path(getattr(draft, 'name', draft)).name}"] = {"draft_model": draft}
    for way in ways.values():
        vlm.ask("Hi", max_tokens=2, **way)
    print(HEADER, "|---|---|---:|---:|---:|---:|---:|", sep="\n")
    for prompt in PROMPTS:
        for row in measure(vlm, prompt, ways, options):
            print(row, flush=True)


def measure(
    vlm: VLM, prompt: str, ways: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> Iterator[str]:
    """Yield a table row for each way to answer. Raises SystemExit where answers differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(options.runs):
        for name, way in ways.items():
            begun = time.process_time()
            answers[name] = vlm.ask(PROMPTS[prompt], max_tokens=options.max_tokens, **way)
            seconds[name].append(time.process_time() - begun)
    for name, answer in answers.items():
        if answer.token_ids != answers["plain"].token_ids:
            raise SystemExit(f"{name} gives another answer than plain decoding")
        usage, count = answer.usage, len(answer.token_ids)
        taken, plain = median(seconds[name]), median(seconds["plain"])
        yield (
            f"| {prompt} | {name} | {1000 * taken / count:.0f} | {taken / plain:.2f} | "
            f"{usage.drafted_tokens} | {usage.accepted_tokens} | "
            f"{count / (count - usage.accepted_tokens):.2f} |"
        )


if __name__ == "__main__":
    main()
