"""Several clients of one server: ``python -m benchmarks.serving``.

Starts ``internvl3 serve`` and, where it is installed, ``mlx_vlm.server`` on the same random
checkpoint, one after the other, and asks each the same over HTTP:

- N questions without and with a photo, one after another and all at once;
- a question about a photo of 13 tiles, and while that is read, a short question without an image:
  how long until its first token, alone and beside the photo.

Every photo and every question is new to the server, so no cache helps. Random weights may end an
answer early, so tokens are counted. What a server answers with an error is shown as failed.
"""

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.arguments import benchmark_parser, write_results
from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import JPEG_QUALITY, SIZES, synthetic_photo
from benchmarks.processes import ROOT, installed_sides
from benchmarks.sides import OURS

START_TIMEOUT_S, ANSWER_TIMEOUT_S = 180, 600
LONG_TILES = "13 tiles"
FILLER = "The harbor lies below the hill, and boats come in with the tide. " * 8
SERIAL = count(1)  # numbers photos and questions, so that none repeats


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    folder = write_checkpoint(args.work / args.shape, SHAPES[args.shape])
    found = {side: measure_server(side, folder, args) for side in installed_sides()}
    print(table(found, args))
    write_results(args.json, {"sides": found, "clients": args.clients})


def argument_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("serving", __doc__, shape="server")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    return parser


@dataclass
class Reply:
    """One streamed answer: seconds to the first text and to the end, and its tokens."""

    first_s: float = 0.0
    whole_s: float = 0.0
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)


def measure_server(side: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Start a server, measure it, and stop it."""
    print(f"{side} ...", file=sys.stderr, flush=True)
    with running_server(side, folder, args.work) as (url, pid):
        ask(url, str(folder), question(), 2)  # the first answer loads and compiles
        runs = [measure_once(url, str(folder), pid, args) for _ in range(args.runs)]
    return {key: median(run[key] for run in runs) for key in runs[0]}


def measure_once(url: str, model: str, pid: int, args: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, photo in (("text", None), ("photos", "1 tile")):
        for name, run in (("one after another", in_turn), ("at once", at_once)):
            asked = [question(photo) for _ in range(args.clients)]
            before, started = process_seconds(pid), time.perf_counter()
            replies = run(url, model, asked, args.tokens)
            wall, cpu = time.perf_counter() - started, process_seconds(pid) - before
            failed = any(reply.tokens == 0 for reply in replies)
            tokens = sum(reply.tokens for reply in replies)
            row = f"{kind}, {name}"
            found[f"{row}: seconds"] = nan if failed else wall
            found[f"{row}: processor seconds"] = nan if failed else cpu
            found[f"{row}: tokens/s"] = nan if failed else tokens / wall
    found["short question alone: first token"] = ask(url, model, question(), 2).first_s or nan
    long, short = beside_long_prompt(url, model)
    found["photo of 13 tiles: first token"] = long.first_s or nan
    found["short question beside it: first token"] = short.first_s if long.first_s else nan
    return found


def in_turn(url: str, model: str, asked: list[Any], tokens: int) -> list[Reply]:
    return [ask(url, model, one, tokens) for one in asked]


def at_once(url: str, model: str, asked: list[Any], tokens: int) -> list[Reply]:
    replies: list[Reply] = []
    run_threads([lambda one=one: replies.append(ask(url, model, one, tokens)) for one in asked])  # type: ignore[misc]
    return replies


def beside_long_prompt(url: str, model: str) -> tuple[Reply, Reply]:
    """Ask about the large photo, and a moment later a short question."""
    replies: dict[str, Reply] = {}

    def short() -> None:
        time.sleep(0.3)  # the photo is decoded and its tiles are being read
        replies["short"] = ask(url, model, question(), 2)

    run_threads(
        [lambda: replies.update(long=ask(url, model, question(LONG_TILES), 2)), short],
    )
    return replies["long"], replies["short"]


def run_threads(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def question(photo: str | None = None) -> list[dict[str, Any]]:
    """Return the content of a message that was never sent before."""
    number = next(SERIAL)
    parts: list[dict[str, Any]] = []
    if photo is not None:
        url = f"data:image/jpeg;base64,{base64.b64encode(new_photo(photo, number)).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": f"Question {number}: " + FILLER + "What is it?"}]


def new_photo(name: str, number: int) -> bytes:
    """Return a photo of SIZES as JPEG, shifted so that no two are equal."""
    pixels = np.array(synthetic_photo(*SIZES[name]))
    shifted = np.roll(pixels, (7 * number, 13 * number), axis=(0, 1))
    file = io.BytesIO()
    Image.fromarray(shifted).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def ask(url: str, model: str, content: list[dict[str, Any]], tokens: int) -> Reply:
    """Send a chat completion and read its stream."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    reply, started = Reply(), time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
        for line in response:
            read_line(line, reply, started)
    reply.whole_s = time.perf_counter() - started
    return reply


def read_line(line: bytes, reply: Reply, started: float) -> None:
    """Note what one line of a stream says."""
    if not line.startswith(b"data: {"):
        return
    chunk = json.loads(line[len(b"data: ") :])
    choices = chunk.get("choices") or [{}]
    said = choices[0].get("delta", {})
    if not reply.first_s and (said.get("content") or choices[0].get("finish_reason")):
        reply.first_s = time.perf_counter() - started
    usage = chunk.get("usage") or {}
    reply.tokens = usage.get("completion_tokens") or usage.get("output_tokens") or reply.tokens


@contextmanager
def running_server(side: str, folder: Path, work: Path) -> Iterator[tuple[str, int]]:
    """Start a server on a free port; yield its address and its process."""
    port = free_port()
    words = {
        OURS: ["-m", "internvl3_mlx", "serve", "--model", str(folder), "--quiet"],
    }.get(side, ["-m", "mlx_vlm.server", "--model", str(folder), "--host", "127.0.0.1"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "INTERNVL3_CACHE": str(work / "cache")}
    log = (work / f"server-{side}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, *words, "--port", str(port)],
        stdout=log,
        stderr=log,
        cwd=ROOT,
        env=environment,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Raise RuntimeError when the server ends or is not ready in time."""
    ends = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{process.args} did not start; its log is beside the checkpoint")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_seconds(pid: int) -> float:
    """Return the processor seconds of a process so far: user and system, all threads."""
    status = Path(f"/proc/{pid}/stat")
    if status.exists():
        fields = status.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    words = ["ps", "-o", "cputime=", "-p", str(pid)]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    parts = [float(part) for part in out.rpartition("-")[2].split(":")]
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def table(found: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    sides = list(found)
    lines = [
        f"{args.clients} clients, {args.tokens} tokens each (checkpoint {args.shape}):",
        "",
        f"| | {' | '.join(sides)} |",
        f"|---|{'---:|' * len(sides)}",
        *(
            f"| {key} | {' | '.join(cell(found[side][key]) for side in sides)} |"
            for key in found[sides[0]]
        ),
    ]
    for side in sides:
        for kind in ("text", "photos"):
            clock, processor = (
                cell(ratio(found[side], kind, unit)) for unit in ("seconds", "processor seconds")
            )
            lines += ["", f"{side}, {kind}: at once {clock} times as fast, processor {processor}"]
    return "\n".join(lines)


WAYS = ("one after another", "at once")


def ratio(figures: dict[str, float], kind: str, unit: str) -> float:
    """Return how many times as long one after another takes."""
    alone, together = (figures[f"{kind}, {way}: {unit}"] for way in WAYS)
    return alone / together if together else nan


def cell(value: float) -> str:
    return "failed" if isnan(value) else f"{value:,.2f}"


if __name__ == "__main__":
    main()
