"""The second turn of a conversation about an image: ``python -m benchmarks.chat``.

Measures the time to the first token of a follow-up question, on one checkpoint in one run: by our
conversation, by reading everything again, and by mlx-vlm, which encodes the image again on every
turn; also with its ``PromptCacheState``, which compares token ids but not images.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import benchmark_parser, write_results
from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import write_photo
from benchmarks.prompt import QUESTION

FOLLOW_UP = "And which color is there most of?"
FIRST_ANSWER = (
    "It shows soft patches of many colors."  # mlx-vlm's first answer, put into its prompt
)
ANSWER_TOKENS = 8


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    folder = write_checkpoint(args.work / args.shape, SHAPES[args.shape])
    photo = write_photo(args.work / "photos", args.photo)
    found = dict(measure_ways(folder, photo, args.runs))
    print(table(found, args.photo, args.shape))
    write_results(args.json, {"seconds": found, "runs": args.runs})


def argument_parser() -> argparse.ArgumentParser:
    return benchmark_parser("chat", __doc__, photo="7 tiles")


def measure_ways(folder: Path, photo: Path, runs: int) -> Iterator[tuple[str, float]]:
    """Yield the median seconds of each way."""
    for name, second_turn in ways(folder, photo).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        yield name, median(second_turn() for _ in range(runs))


def ways(folder: Path, photo: Path) -> dict[str, Callable[[], float]]:
    from internvl3_mlx import load

    vlm = load(str(folder))
    vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early
    found = {
        "internvl3-mlx, conversation": lambda: ours(vlm, photo, cached=True),
        "internvl3-mlx, without a cache": lambda: ours(vlm, photo, cached=False),
    }
    try:
        import mlx_vlm
    except ImportError:
        return found
    model, processor = mlx_vlm.load(str(folder))
    processor.tokenizer.stopping_criteria.eos_token_ids = []
    found["mlx-vlm"] = lambda: peer(folder, photo, (model, processor), cached=False)
    found["mlx-vlm, PromptCacheState"] = lambda: peer(
        folder, photo, (model, processor), cached=True
    )
    return found


def ours(vlm: Any, photo: Path, *, cached: bool) -> float:
    """Time the second of two messages, with what the conversation keeps or from scratch."""
    conversation = vlm.conversation()
    conversation.ask(QUESTION, [photo], max_tokens=ANSWER_TOKENS)
    if cached:
        return time_to_first(conversation.stream(FOLLOW_UP, max_tokens=ANSWER_TOKENS))
    settings = {"history": conversation.history, "max_tokens": ANSWER_TOKENS}
    started = time.perf_counter()  # includes opening the image again
    return time_to_first(vlm.stream(FOLLOW_UP, [photo], **settings), started)


def peer(folder: Path, photo: Path, loaded: tuple[Any, Any], *, cached: bool) -> float:
    """Ask mlx-vlm twice, the image in the first turn, by the published template."""
    from mlx_vlm import stream_generate
    from mlx_vlm.generate import PromptCacheState

    more = {"prompt_cache_state": PromptCacheState()} if cached else {}
    started = 0.0
    for prompt in (
        chat_prompt(folder, QUESTION),
        chat_prompt(folder, QUESTION, FIRST_ANSWER, FOLLOW_UP),
    ):
        started = time.perf_counter()
        stream = stream_generate(
            *loaded, prompt, [str(photo)], max_tokens=ANSWER_TOKENS, temperature=0.0, **more
        )
        seconds = time_to_first(stream, started)
        list(stream)
    return seconds


def chat_prompt(folder: Path, *said: str) -> str:
    """Return a conversation's prompt for mlx-vlm, which replaces ``<image>``."""
    from internvl3_mlx.config import read_config
    from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia
    from internvl3_mlx.prompt.template import load_template

    messages = [Message("user", said[0], (MessageMedia((1,)),))]
    messages += [
        Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(said)
    ][1:]
    parts = load_template(read_config(folder), folder).render(messages, None)
    return "".join("<image>" if isinstance(part, ImageSegment) else part.text for part in parts)


def time_to_first(stream: Iterator[Any], started: float | None = None) -> float:
    """Return the seconds until the first chunk."""
    started = time.perf_counter() if started is None else started
    next(stream)
    return time.perf_counter() - started


def table(found: dict[str, float], photo: str, shape: str) -> str:
    baseline = next(iter(found.values()))
    lines = [
        f"Second turn about a photo of {photo} (checkpoint {shape}), to the first token:",
        "",
        "| way | ms | relative to the conversation |",
        "|---|---|---|",
        *(f"| {name} | {1e3 * s:,.0f} | {s / baseline:,.1f} |" for name, s in found.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
