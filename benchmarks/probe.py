"""One measured process: ``python -m benchmarks.probe TASK SIDE FOLDER [PHOTO ...]`` prints its
results as JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

MB = 1e6
PREFILL_TOKENS = (60, 3400)  # a question alone, and with an image of 13 tiles
DECODE_PROMPT, DECODE_TOKENS, DECODE_ROUNDS = 32, 64, 4
WIDE_TOKENS, WIDE_ROUNDS = 9, 3  # of a real width: a token takes a CPU a third of a second
ENCODE_ROUNDS = 2
EACH_TOKENS, EACH_TOGETHER = 16, (1, 8)

Results = dict[str, Any]


def main(task: str, side: str, folder: str, *photos: str) -> None:
    result = TASKS[task](side, Path(folder), [Path(photo) for photo in photos])
    print(json.dumps(result))


def import_alone(side: str, _folder: Path, _photos: list[Path]) -> Results:
    """Time the imports that a first question needs."""
    return {"import": timed(lambda: import_program(side))}


def load(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Load a checkpoint once, after the imports."""
    make = import_program(side)
    results: Results = {"load": timed(lambda: make(folder))}
    return results | peaks()


def stages(side: str, folder: Path, photos: list[Path]) -> Results:
    """Process, encode and answer about each image; the first one warms up."""
    program, results = import_program(side)(folder), {}
    next(program.answer(photos[:1], 1))
    for photo in photos:
        name, inputs = photo.stem, program.process([photo])
        results[f"encode {name}"] = timed(lambda inputs=inputs: program.encode(inputs))
        results[f"first {name}"] = timed(lambda p=photo: next(program.answer([p], 1)))
    return results


def reading(side: str, folder: Path, photos: list[Path]) -> Results:
    """Process each image for the second time."""
    program, results = import_program(side)(folder), {}
    for photo in photos:
        program.process([photo])
        results[f"process {photo.stem}"] = timed(lambda photo=photo: program.process([photo]))
    return results


def prefill(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Prefill a short and a long text up to the first token."""
    program, results = import_program(side)(folder), {}
    for count in PREFILL_TOKENS:
        next(program.continue_text(plain_ids(min(PREFILL_TOKENS)), 1))
        results[f"prefill {count}"] = timed(
            lambda n=count: next(program.continue_text(plain_ids(n), 1))
        )
    return results


def decode(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Generate tokens by the program's stream and by the bare loop, in alternation."""
    program, ids = import_program(side)(folder), plain_ids(DECODE_PROMPT)
    ways = {"stream": program.continue_text, "bare": program.bare_loop}
    rounds = [
        {name: per_token(way(ids, DECODE_TOKENS)) for name, way in ways.items()}
        for _ in range(DECODE_ROUNDS)
    ]
    return {name: medians_of([one[name] for one in rounds]) for name in ways}


def decode_wide(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Generate a few tokens by the program's stream, after a first round that does not count."""
    program, ids = import_program(side)(folder), plain_ids(DECODE_PROMPT)
    rounds = [per_token(program.continue_text(ids, WIDE_TOKENS)) for _ in range(WIDE_ROUNDS)]
    return {"stream": medians_of(rounds[1:])}


def encode(side: str, folder: Path, photos: list[Path]) -> Results:
    """Encode each image, after a first time that does not count."""
    program, results = import_program(side)(folder), {}
    for photo in photos:
        inputs = program.process([photo])
        program.encode(inputs)
        rounds = [timed(lambda inputs=inputs: program.encode(inputs)) for _ in range(ENCODE_ROUNDS)]
        results[f"encode {photo.stem}"] = medians_of(rounds)
    return results


def ways(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Decode in every way, in alternation, and batches."""
    from benchmarks.sides import BATCH_WAYS

    program, ids = import_program(side)(folder), plain_ids(DECODE_PROMPT)
    names = (*program.ways, *map(batch_name, BATCH_WAYS))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(DECODE_ROUNDS):
        for way in program.ways:
            rounds[way].append(per_token(program.continue_text(ids, DECODE_TOKENS, way)))
        for way in BATCH_WAYS:
            rounds[batch_name(way)].append(per_batch_token(program, way))
    return {name: medians_of(found[1:]) for name, found in rounds.items()}  # the first warms up


def batch_name(way: str) -> str:
    return f"batch, {way}"


def per_batch_token(program: Any, way: str) -> dict[str, float]:
    """Return the cost of a token of a batch, its prompts not included.

    That is what many tokens take more than few; prompts take as long as all their tokens.
    """
    from benchmarks.sides import BATCH

    short, long = (timed(lambda n=n: program.batch(n, way)) for n in (2, DECODE_TOKENS))
    count = BATCH * (DECODE_TOKENS - 2)
    return {unit: (long[unit] - short[unit]) / count for unit in long}


def each(side: str, folder: Path, photos: list[Path]) -> Results:
    """Answer about each photo, one at a time and several together."""
    program = import_program(side)(folder)
    program.each(photos[:2], EACH_TOKENS, 2)
    return {
        f"each {together}": timed(lambda n=together: program.each(photos, EACH_TOKENS, n))
        for together in EACH_TOGETHER
    }


def memory(side: str, folder: Path, photos: list[Path]) -> Results:
    """Encode all images at once, in a process that does nothing else."""
    import mlx.core as mx

    program = import_program(side)(folder)
    inputs = program.process(photos)
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    program.encode(inputs)
    return {**peaks(), "work_mb": (mx.get_peak_memory() - weights) / MB}


def same(side: str, folder: Path, photos: list[Path]) -> Results:
    """Return what each program makes of the images, to be compared."""
    program = import_program(side)(folder)
    return {photo.stem: program.input_facts(program.process([photo])) for photo in photos}


def kernels(side: str, folder: Path, _photos: list[Path]) -> Results:
    """Count the kernels of a token and layer at 4 bits: plain, compiled, and with our kernels."""
    import mlx.nn as nn

    from benchmarks.kernel_count import count_batch_kernels, count_kernels, kernels_per_layer

    model = import_program(side)(folder).vlm.model
    nn.quantize(model.language_model, group_size=64, bits=4)
    ways = {"plain": False, "compiled": True}
    alone = {name: kernels_per_layer(model, compiled=compiled) for name, compiled in ways.items()}
    batch = kernels_per_layer(model, compiled=True, count=count_batch_kernels)
    own = kernels_per_layer(model, compiled=True, count=partial(count_kernels, own=True))
    return {**alone, "compiled batch": batch, "compiled, own-kernel": own}


TASKS: dict[str, Callable[[str, Path, list[Path]], Results]] = {
    "import": import_alone,
    "load": load,
    "stages": stages,
    "reading": reading,
    "prefill": prefill,
    "decode": decode,
    "decode wide": decode_wide,
    "encode": encode,
    "ways": ways,
    "each": each,
    "memory": memory,
    "kernels": kernels,
    "same": same,
}


def import_program(side: str) -> Any:
    """Import a program completely, as a first question would."""
    from benchmarks import sides

    if side == sides.OURS:
        import internvl3_mlx

        assert internvl3_mlx.load
    else:
        import mlx_vlm

        assert mlx_vlm.load
    return sides.SIDES[side]


def timed(action: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds an action takes: of the processors (user and system, all threads) and by
    the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def medians_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {unit: median(one[unit] for one in rounds) for unit in rounds[0]}


def per_token(stream: Iterable[int]) -> dict[str, float]:
    """Return the cost of a token after the first. ``thread`` is what the driving thread spends on
    Python and on graphs, while MLX computes on its own threads."""
    rest: Iterator[int] = iter(stream)
    next(rest)
    count = 0

    def run() -> None:
        nonlocal count
        count = sum(1 for _ in rest)

    driving = time.thread_time()
    total = timed(run)
    total["thread"] = time.thread_time() - driving
    return {unit: seconds / count for unit, seconds in total.items()}


def plain_ids(count: int) -> list[int]:
    """Return the ids of single bytes, repeated: every vocabulary has them."""
    return list(chain.from_iterable(repeat(range(32, 132), count // 100 + 1)))[:count]


def peaks() -> Results:
    """Return the peaks of MLX's allocator and of resident memory, in MB."""
    import mlx.core as mx

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"allocator_mb": mx.get_peak_memory() / MB, "resident_mb": resident / MB}


if __name__ == "__main__":
    main(*sys.argv[1:])
