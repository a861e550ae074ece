"""Put a server under load and check every answer: ``python -m examples.serve_load.run``.

Each client asks one question after another about the demo's sample images, whose answers are known.
The report says how many answers were right, how long they took, whether some clients waited longer
than others, and how much memory the server took from the first requests to the last.
"""

import argparse
import base64
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from internvl3_mlx.loading.resolve import DEMO_FOLDER

TIMEOUT_S = 600
RIGHT, WRONG, LOST = "right", "wrong", "lost"


@dataclass(eq=False)
class Results:
    """What came back. seconds: of each request, by client."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, client: int, outcome: str, seconds: float) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            self.seconds.setdefault(client, []).append(seconds)

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())


def main(words: list[str] | None = None) -> int:
    args = make_parser().parse_args(words)
    bodies = sample_bodies()
    with run_server() as (port, pid):
        results, memory = Results(), [resident_mb(pid)]
        started = time.perf_counter()
        threads = [
            threading.Thread(target=ask_all, args=(port, client, args, bodies, results))
            for client in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(args.sample_seconds)
            memory.append(resident_mb(pid))
        report(results, memory, time.perf_counter() - started)
    return 0 if results.outcomes[RIGHT] == args.requests else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("run", description=__doc__)
    parser.add_argument("--clients", type=int, default=200, help="clients at once")
    parser.add_argument("--requests", type=int, default=1000, help="requests of all together")
    parser.add_argument("--sample-seconds", type=float, default=2.0, help="between looks at memory")
    return parser


@contextmanager
def run_server() -> Iterator[tuple[int, int]]:
    """Start a server with the demo model; yield its port and its process id."""
    command = [sys.executable, "-m", "internvl3_mlx", "serve", "--model", "demo", "--port", "0"]
    with subprocess.Popen([*command, "--quiet"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:(\d+)$", line.strip()) for line in process.stderr)
        try:
            yield int(next(match[1] for match in found if match)), process.pid
        finally:
            process.terminate()
            process.stderr.read()


def sample_bodies() -> list[tuple[bytes, str]]:
    """Return a request about each sample image, with the answer that it should get."""
    folder = DEMO_FOLDER / "samples"
    bodies = []
    for sample in json.loads((folder / "samples.json").read_text("utf-8")):
        data = base64.b64encode((folder / sample["file"]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        content = [image, {"type": "text", "text": sample["question"]}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
        bodies.append((json.dumps(body).encode(), sample["answer"]))
    return bodies


def ask_all(
    port: int,
    client: int,
    args: argparse.Namespace,
    bodies: Sequence[tuple[bytes, str]],
    results: Results,
) -> None:
    """Ask this client's share of the requests."""
    for number in range(client, args.requests, args.clients):
        body, expected = bodies[number % len(bodies)]
        started = time.perf_counter()
        outcome = ask(port, body, expected)
        results.add(client, outcome, time.perf_counter() - started)


def ask(port: int, body: bytes, expected: str) -> str:
    """Ask once; say whether the answer is right, or the status that refuses it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        content = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return LOST
    finally:
        connection.close()
    if response.status != http.client.OK:
        return f"status {response.status}"
    return RIGHT if content["choices"][0]["message"]["content"] == expected else WRONG


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process, as ``ps`` tells it."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(shown.stdout or 0) / 1024


def report(results: Results, memory: Sequence[float], seconds: float) -> None:
    every = sorted(one for each in results.seconds.values() for one in each)
    means = sorted(sum(each) / len(each) for each in results.seconds.values())
    lines = {
        "requests": results.count,
        "outcomes": ", ".join(f"{count} {name}" for name, count in results.outcomes.items()),
        "requests per second": f"{results.count / seconds:.1f}",
        "seconds": f"median {median(every):.2f}, 95% {every[int(len(every) * 0.95)]:.2f}, "
        f"longest {every[-1]:.2f}",
        "mean of a client": f"{means[0]:.2f} to {means[-1]:.2f} s",
        "memory": f"{memory[0]:.0f} MB at first, {median(memory):.0f} MB in the middle, "
        f"{memory[-1]:.0f} MB at last",
    }
    for name, value in lines.items():
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    raise SystemExit(main())
