"""What speculative decoding costs and gains on real text: processor time and accepted drafts.

    python -m benchmarks.smollm2 --out internvl-smol
    python -m benchmarks.speculation internvl-smol

A text that is to be repeated gives prompt lookup much to find, a story next to nothing. The draft
model is the model itself: as dear as it is, nothing is to be drafted with it. The ways alternate.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from internvl3_mlx import VLM, load

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
    parser.add_argument("--runs", type=int, default=3, help="medians are taken")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    vlm = load(options.model)
    vlm.ask("Hi", max_tokens=2)
    print(HEADER, "|---|---|---:|---:|---:|---:|---:|", sep="\n")
    for prompt in PROMPTS:
        for row in measure(vlm, prompt, options.runs, options.max_tokens):
            print(row, flush=True)


def measure(vlm: VLM, prompt: str, runs: int, max_tokens: int) -> Iterator[str]:
    """Yield a table row for each way to answer. Raises SystemExit where answers differ."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "lookup": {"lookup": True},
        "draft model": {"draft_model": vlm},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(runs):
        for name, options in ways.items():
            begun = time.process_time()
            answers[name] = vlm.ask(PROMPTS[prompt], max_tokens=max_tokens, **options)
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
