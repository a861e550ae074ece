"""The second turn of a talk about a photo: ``python -m benchmarks.chat``.

Times to the first token of a follow-up question, on one checkpoint in one run: by our talk, by
ours reading everything again, and by mlx-vlm, which looks at the photo again on every turn; also
with its ``PromptCacheState``, which compares token ids but not pictures.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import SIZES, write_photo
from benchmarks.prompt import QUESTION
from benchmarks.report import machine_info

FOLLOW_UP = "And which colour is there most of?"
SAID = "It shows soft patches of many colours."  # mlx-vlm's first answer, put into its prompt
ANSWER_TOKENS = 8


def main(words: list[str] | None = None) -> None:
    asked = parser().parse_args(words)
    folder = write_checkpoint(asked.work / asked.shape, SHAPES[asked.shape])
    photo = write_photo(asked.work / "photos", asked.photo)
    found = dict(measure_ways(folder, photo, asked.runs))
    print(table(found, asked.photo, asked.shape))
    if asked.json:
        content = {"machine": machine_info(), "seconds": found, "runs": asked.runs}
        asked.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks.chat", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks"
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--runs", type=int, default=3, help="medians are taken")
    made.add_argument("--shape", default="photo", choices=list(SHAPES))
    made.add_argument("--photo", default="7 tiles", choices=list(SIZES))
    made.add_argument("--work", type=Path, default=work, help="where checkpoints are kept")
    return made


def measure_ways(folder: Path, photo: Path, runs: int) -> Iterator[tuple[str, float]]:
    """Yield the median time of every way, in seconds."""
    for name, second_turn in ways(folder, photo).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        yield name, median(second_turn() for _ in range(runs))


def ways(folder: Path, photo: Path) -> dict[str, Callable[[], float]]:
    from internvl3_mlx import load

    vlm = load(str(folder))
    vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early
    found = {
        "internvl3-mlx, the talk": lambda: ours(vlm, photo, kept=True),
        "internvl3-mlx, everything again": lambda: ours(vlm, photo, kept=False),
    }
    try:
        import mlx_vlm
    except ImportError:
        return found
    model, processor = mlx_vlm.load(str(folder))
    processor.tokenizer.stopping_criteria.eos_token_ids = []
    found["mlx-vlm"] = lambda: peer(folder, photo, (model, processor), kept=False)
    found["mlx-vlm, PromptCacheState"] = lambda: peer(folder, photo, (model, processor), kept=True)
    return found


def ours(vlm: Any, photo: Path, *, kept: bool) -> float:
    """Hold a talk of two turns; without what was ``kept``, ask the second of a fresh run."""
    talk = vlm.conversation()
    talk.ask(QUESTION, [photo], max_tokens=ANSWER_TOKENS)
    if kept:
        return time_to_first(talk.stream(FOLLOW_UP, max_tokens=ANSWER_TOKENS))
    settings = {"history": talk.history, "max_tokens": ANSWER_TOKENS}
    started = time.perf_counter()  # opening the photo again is part of it
    return time_to_first(vlm.stream(FOLLOW_UP, [photo], **settings), started)


def peer(folder: Path, photo: Path, loaded: tuple[Any, Any], *, kept: bool) -> float:
    """Ask mlx-vlm twice, the photo in its first turn, as the published template has it."""
    from mlx_vlm import stream_generate
    from mlx_vlm.generate import PromptCacheState

    more = {"prompt_cache_state": PromptCacheState()} if kept else {}
    started = 0.0
    for prompt in (chat_prompt(folder, QUESTION), chat_prompt(folder, QUESTION, SAID, FOLLOW_UP)):
        started = time.perf_counter()
        stream = stream_generate(
            *loaded, prompt, [str(photo)], max_tokens=ANSWER_TOKENS, temperature=0.0, **more
        )
        seconds = time_to_first(stream, started)
        list(stream)
    return seconds


def chat_prompt(folder: Path, *said: str) -> str:
    """Write a talk's prompt for mlx-vlm, which puts the photo where ``<image>`` stands."""
    from internvl3_mlx.config import read_config
    from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia
    from internvl3_mlx.prompt.template import load_template

    turns = [Message("user", said[0], (MessageMedia((1,)),))]
    turns += [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(said)][
        1:
    ]
    parts = load_template(read_config(folder), folder).render(turns, None)
    return "".join("<image>" if isinstance(part, ImageSegment) else part.text for part in parts)


def time_to_first(stream: Iterator[Any], started: float | None = None) -> float:
    """Take the first piece, and the time until it came."""
    started = time.perf_counter() if started is None else started
    next(stream)
    return time.perf_counter() - started


def table(found: dict[str, float], photo: str, shape: str) -> str:
    talk = next(iter(found.values()))
    lines = [
        f"Second turn about a photo of {photo} (checkpoint {shape}), to the first token:",
        "",
        "| way | ms | times the talk's |",
        "|---|---|---|",
        *(f"| {name} | {1e3 * s:,.0f} | {s / talk:,.1f} |" for name, s in found.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
