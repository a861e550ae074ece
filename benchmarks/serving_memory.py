"""Memory over many requests: ``python -m benchmarks.serving_memory``.

Sends requests about images that are all different to an engine in this process, some of them
canceled on the way, and prints the memory of MLX and of the process after every tenth of them.
"""

import argparse
import asyncio
import gc
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.serving.engine import Engine
from internvl3_mlx.serving.requests import AnswerRequest, ChatMessage, ImagePart, TextPart
from internvl3_mlx.serving.settings import EngineSettings

AT_ONCE = 16
CANCEL_EVERY = 10
MB = 1_000_000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serving_memory", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args(argv)
    settings = EngineSettings(
        {"model": args.model}, prefix_cache_nbytes=4 * MB, feature_cache_nbytes=MB
    )
    engine = Engine(settings)
    engine.tiled.limit_nbytes = MB  # all caches are full before the first row
    engine.start()
    print("| requests | MLX, MB | process, MB |\n|---:|---:|---:|")
    try:
        for tenth in range(10):
            asyncio.run(send(engine, tenth * args.requests // 10, args.requests // 10))
            print_row((tenth + 1) * args.requests // 10)
    finally:
        engine.stop(0)


async def send(engine: Engine, start: int, count: int) -> None:
    """Send requests, a few at a time."""
    for first in range(start, start + count, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, start + count))
        await asyncio.gather(*(ask(engine, number) for number in numbers))


async def ask(engine: Engine, number: int) -> None:
    parts = (ImagePart(new_image(number)), TextPart(f"What is number {number}?"))
    request = AnswerRequest((ChatMessage("user", parts),), GenerationConfig(max_tokens=4))
    stream = await engine.submit(request)
    async for _ in stream:
        if number % CANCEL_EVERY == 0:
            await stream.aclose()


def new_image(number: int) -> bytes:
    """Return a small image as PNG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def print_row(requests: int) -> None:
    import mlx.core as mx

    gc.collect()
    print(
        f"| {requests:,} | {mx.get_active_memory() / MB:,.1f} | {resident_mb():,.1f} |", flush=True
    )


def resident_mb() -> Any:
    """Return what the system counts for this process now; the peak where /proc is missing."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB


if __name__ == "__main__":
    main()
