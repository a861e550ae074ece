"""One measured process: ``python -m benchmarks.probe TASK SIDE FOLDER [PHOTO ...]`` prints figures
as JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

MB = 1e6
PREFILL_TOKENS = (60, 3400)  # a question alone, and with a photo of 13 tiles
DECODE_PROMPT, DECODE_TOKENS, DECODE_ROUNDS = 32, 64, 4

Figures = dict[str, Any]


def main(task: str, side: str, folder: str, *photos: str) -> None:
    result = TASKS[task](side, Path(folder), [Path(photo) for photo in photos])
    print(json.dumps(result))


def import_alone(side: str, _folder: Path, _photos: list[Path]) -> Figures:
    """Import what a first question needs."""
    return {"import": cost(lambda: bring(side))}


def load(side: str, folder: Path, _photos: list[Path]) -> Figures:
    """Load once, after the imports; peaks of the allocator and of the process."""
    make = bring(side)
    figures: Figures = {"load": cost(lambda: make(folder))}
    return figures | peaks()


def stages(side: str, folder: Path, photos: list[Path]) -> Figures:
    """Read, see and answer about each photo; the first one warms up."""
    program, figures = bring(side)(folder), {}
    next(program.answer(photos[:1], 1))
    for photo in photos:
        name, inputs = photo.stem, program.read([photo])
        figures[f"see {name}"] = cost(lambda inputs=inputs: program.see(inputs))
        figures[f"first {name}"] = cost(lambda p=photo: next(program.answer([p], 1)))
    return figures


def reading(side: str, folder: Path, photos: list[Path]) -> Figures:
    """Read each photo for the second time."""
    program, figures = bring(side)(folder), {}
    for photo in photos:
        program.read([photo])
        figures[f"read {photo.stem}"] = cost(lambda photo=photo: program.read([photo]))
    return figures


def prefill(side: str, folder: Path, _photos: list[Path]) -> Figures:
    """Read a short and a long text up to the first token."""
    program, figures = bring(side)(folder), {}
    for count in PREFILL_TOKENS:
        next(program.continue_text(plain_ids(min(PREFILL_TOKENS)), 1))
        figures[f"prefill {count}"] = cost(
            lambda n=count: next(program.continue_text(plain_ids(n), 1))
        )
    return figures


def decode(side: str, folder: Path, _photos: list[Path]) -> Figures:
    """Write tokens by the program's stream and by the bare loop, in turn."""
    program, ids = bring(side)(folder), plain_ids(DECODE_PROMPT)
    ways = {"stream": program.continue_text, "bare": program.bare_loop}
    rounds = [
        {name: per_token(way(ids, DECODE_TOKENS)) for name, way in ways.items()}
        for _ in range(DECODE_ROUNDS)
    ]
    return {
        name: {unit: median(one[name][unit] for one in rounds) for unit in rounds[0][name]}
        for name in ways
    }


def memory(side: str, folder: Path, photos: list[Path]) -> Figures:
    """See all photos at once, in a process that does nothing else."""
    import mlx.core as mx

    program = bring(side)(folder)
    inputs = program.read(photos)
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    program.see(inputs)
    return {**peaks(), "work_mb": (mx.get_peak_memory() - weights) / MB}


def same(side: str, folder: Path, photos: list[Path]) -> Figures:
    """Say what each program makes of the photos, to be compared."""
    program = bring(side)(folder)
    return {photo.stem: program.input_facts(program.read([photo])) for photo in photos}


TASKS: dict[str, Callable[[str, Path, list[Path]], Figures]] = {
    "import": import_alone,
    "load": load,
    "stages": stages,
    "reading": reading,
    "prefill": prefill,
    "decode": decode,
    "memory": memory,
    "same": same,
}


def bring(side: str) -> Any:
    """Import a program whole, as a first question would."""
    from benchmarks import sides

    if side == sides.OURS:
        import internvl3_mlx

        assert internvl3_mlx.load
    else:
        import mlx_vlm

        assert mlx_vlm.load
    return sides.SIDES[side]


def cost(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds that an action takes: of processors (user and system, all threads) and by the
    clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def per_token(stream: Iterable[int]) -> dict[str, float]:
    """Cost of a token after the first; ``thread`` is what the driving thread spends: Python, graphs
    and handing work over, while MLX computes on threads of its own."""
    rest: Iterator[int] = iter(stream)
    next(rest)
    count = 0

    def run() -> None:
        nonlocal count
        count = sum(1 for _ in rest)

    driving = time.thread_time()
    total = cost(run)
    total["thread"] = time.thread_time() - driving
    return {unit: seconds / count for unit, seconds in total.items()}


def plain_ids(count: int) -> list[int]:
    """Ids of single bytes, over and over: in every vocabulary."""
    return list(chain.from_iterable(repeat(range(32, 132), count // 100 + 1)))[:count]


def peaks() -> Figures:
    """Peaks of MLX's allocator and of the process's resident memory, in MB."""
    import mlx.core as mx

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"allocator_mb": mx.get_peak_memory() / MB, "resident_mb": resident / MB}


if __name__ == "__main__":
    main(*sys.argv[1:])
