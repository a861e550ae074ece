"""What is measured: groups of rows, each with its cases."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.environment import environment_without_torch
from benchmarks.photos import write_album, write_photo
from benchmarks.probe import EACH_TOGETHER, PREFILL_TOKENS, batch_name
from benchmarks.processes import Interpreter, Results, alternate, installed_sides
from benchmarks.prompt import QUESTION
from benchmarks.sides import BATCH, BATCH_WAYS, OURS, PEER, WAYS

PROGRAMS = {
    OURS: ("-m", "internvl3_mlx", "generate"),
    PEER: ("-m", "benchmarks.peer_command"),
}
HELP = {OURS: ("-m", "internvl3_mlx", "--help"), PEER: ("-m", "mlx_vlm", "generate", "--help")}
TEMPERATURE = {OURS: ("--temp", "0.7"), PEER: ("--temperature", "0.7")}
REAL_TOWERS = {"tower 1024": "1024 wide, 3 of 24 layers", "tower 3200": "3200 wide, 1 of 45 layers"}
REAL_DECODERS = {"decoder 1b": "1B, 4 of 24 layers", "decoder 8b": "8B, 1 of 28 layers"}
ALBUM, SMALL_ALBUM = 50, 4
PEAKS = {
    "work_mb": "MLX peak beyond weights and pixels",
    "allocator_mb": "MLX peak",
    "resident_mb": "resident peak",
}


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of the table: a result of both programs in ``unit``, None where mlx-vlm is
    missing."""

    group: str
    name: str
    unit: str
    ours: float
    peer: float | None

    @property
    def ratio(self) -> float | None:
        """Return how many times less ours takes; None where the difference is lost in the noise."""
        measured = self.peer is not None and self.ours > 0 and self.peer > 0
        return self.peer / self.ours if measured and self.peer else None


@dataclass(frozen=True)
class Benchmark:
    """Where files are kept between runs, how often to measure, and with which checkpoint."""

    work_dir: Path
    runs: int = 5
    shape: str = "photo"
    quick: bool = False  # skip what takes minutes without a fast BLAS

    def sizes(self, *names: str) -> tuple[str, ...]:
        return names[:1] if self.quick else names

    def checkpoint(self, name: str) -> Path:
        return write_checkpoint(self.work_dir / name, SHAPES[name])

    def photos(self, *names: str) -> list[Path]:
        return [write_photo(self.work_dir / "photos", name) for name in names]

    def probe(self, task: str, shape: str, *photos: str) -> dict[str, Results]:
        """Measure a task of ``probe`` with both programs."""
        folder, files = self.checkpoint(shape), self.photos(*photos)
        return alternate(lambda side: Interpreter().probe(task, side, folder, files), self.runs)


def same_input(bench: Benchmark) -> Iterator[BenchmarkRow]:
    """Stop when the programs read different tokens or pixels."""
    names = bench.sizes("1 tile", "7 tiles", "13 tiles", "1 MP", "12 MP")
    folder, files = bench.checkpoint(bench.shape), bench.photos(*names)
    facts = [Interpreter().probe("same", side, folder, files) for side in installed_sides()]
    if any(fact != facts[0] for fact in facts):
        raise RuntimeError("the two programs do not read the same tokens and pixels")
    yield from ()


def startup(bench: Benchmark) -> Iterator[BenchmarkRow]:
    folder = bench.checkpoint(bench.shape)
    pythons = {
        "with torch installed": Interpreter(),
        "without torch": Interpreter(environment_without_torch(bench.work_dir / "without-torch")),
    }
    for name, python in pythons.items():
        helps = alternate(lambda side, p=python: p.time_command(*HELP[side]), bench.runs)
        yield from time_rows(helps, "whole", "Start-up", f"`--help`, {name}")
        imports = alternate(lambda side, p=python: p.probe("import", side, folder), bench.runs)
        yield from time_rows(imports, "import", "Start-up", f"import, {name}")
        for photo in bench.photos(*bench.sizes("1 tile", "13 tiles")):
            words = generate_command(folder, photo)
            sampled = {side: words[side] + TEMPERATURE[side] for side in words}
            for how, command in (("", words), (" at a temperature", sampled)):
                shell = alternate(
                    lambda side, p=python, c=command: p.time_command(*c[side]), bench.runs
                )
                what = f"shell to first token{how}, {photo.stem.replace('_', ' ')}, {name}"
                yield from time_rows(shell, "whole", "Start-up", what)


def loading(bench: Benchmark) -> Iterator[BenchmarkRow]:
    for shape in bench.sizes(bench.shape, "heavy"):
        found = bench.probe("load", shape)
        size = sum(file.stat().st_size for file in bench.checkpoint(shape).glob("*.safetensors"))
        name = f"load, {size / 1e6:.0f} MB of weights"
        yield from time_rows(found, "load", "Loading", name)
        yield from memory_rows(found, "Loading", name)


def preprocessing(bench: Benchmark) -> Iterator[BenchmarkRow]:
    found = bench.probe("reading", bench.shape, "1 MP", "12 MP")
    for name in ("1 MP", "12 MP"):
        yield from time_rows(
            found, f"process {photo_key(name)}", "Preprocessing", f"photo of {name}, 13 tiles"
        )


def tower(bench: Benchmark) -> Iterator[BenchmarkRow]:
    names = bench.sizes("1 tile", "7 tiles", "13 tiles")
    found = bench.probe("stages", bench.shape, *names)
    for name in names:
        yield from time_rows(
            found, f"encode {photo_key(name)}", "Tower", f"tower and projector, {name}"
        )
    for name in names:
        yield from time_rows(
            found, f"first {photo_key(name)}", "First token", f"photo to first token, {name}"
        )


def balanced(bench: Benchmark) -> Iterator[BenchmarkRow]:
    names = bench.sizes("1 tile", "7 tiles")
    found = bench.probe("stages", "balanced", *names)
    for name in names:
        what = f"photo to first token, {name}, larger decoder"
        yield from time_rows(found, f"first {photo_key(name)}", "First token", what)


def prefill(bench: Benchmark) -> Iterator[BenchmarkRow]:
    found = bench.probe("prefill", bench.shape)
    for count in PREFILL_TOKENS:
        yield from time_rows(found, f"prefill {count}", "Prefill", f"text of {count:,} tokens")


def decode(bench: Benchmark) -> Iterator[BenchmarkRow]:
    found = bench.probe("decode", "deep")
    yield from time_rows(found, "stream", "Decoding", "a token, 24 tiny layers")
    yield from time_rows(found, "bare", "Decoding", "the same in a bare argmax loop")
    driving = [1e3 * figures["stream"]["thread"] for figures in found.values()]
    yield BenchmarkRow("Decoding", "its part on the driving thread", "ms", *split_sides(driving))
    added = {side: {"added": stream_overhead(figures)} for side, figures in found.items()}
    yield from time_rows(added, "added", "Decoding", "what the program adds to its loop")


def real_widths(bench: Benchmark) -> Iterator[BenchmarkRow]:
    for shape in bench.sizes(*REAL_TOWERS):
        found = bench.probe("encode", shape, "1 tile")
        what = f"tower and projector, 1 tile, {REAL_TOWERS[shape]}"
        yield from time_rows(found, f"encode {photo_key('1 tile')}", "Real widths", what)
    for shape in bench.sizes(*REAL_DECODERS):
        found = bench.probe("decode wide", shape)
        yield from time_rows(found, "stream", "Real widths", f"a token, {REAL_DECODERS[shape]}")


def ways(bench: Benchmark) -> Iterator[BenchmarkRow]:
    found = bench.probe("ways", "deep")
    for way in WAYS:
        yield from time_rows(found, way, "Ways to decode", f"a token, {way}, 24 tiny layers")
    for way in BATCH_WAYS:
        what = f"a token in a batch of {BATCH}, {way}"
        yield from time_rows(found, batch_name(way), "Ways to decode", what)


def each(bench: Benchmark) -> Iterator[BenchmarkRow]:
    count = SMALL_ALBUM if bench.quick else ALBUM
    folder, photos = bench.checkpoint("tiny"), write_album(bench.work_dir / "photos", count)
    found = alternate(lambda side: Interpreter().probe("each", side, folder, photos), bench.runs)
    for together in EACH_TOGETHER:
        what = f"{count} photos of 1 MP, {together} together"
        yield from time_rows(found, f"each {together}", "Many photos", what)


def kernels(bench: Benchmark) -> Iterator[BenchmarkRow]:
    """Count, and measure nothing: the kernels of a GPU, whatever computes here."""
    found = Interpreter().probe("kernels", OURS, bench.checkpoint("deep"), [])
    for name, count in found.items():
        yield BenchmarkRow("Kernels", f"a token and layer, 4 bits, {name} step", "", count, None)


def memory(bench: Benchmark) -> Iterator[BenchmarkRow]:
    cases = {"13 tiles": ("13 tiles",), "26 tiles": ("13 tiles", "1 MP")}
    for name in bench.sizes(*cases):
        photos = cases[name]
        found = bench.probe("memory", bench.shape, *photos)
        yield from memory_rows(found, "Memory", f"tower, {name}")


GROUPS: dict[str, Callable[[Benchmark], Iterator[BenchmarkRow]]] = {
    "same": same_input,
    "startup": startup,
    "loading": loading,
    "preprocessing": preprocessing,
    "tower": tower,
    "balanced": balanced,
    "prefill": prefill,
    "decode": decode,
    "ways": ways,
    "real": real_widths,
    "each": each,
    "kernels": kernels,
    "memory": memory,
}


def generate_command(folder: Path, photo: Path) -> dict[str, tuple[str, ...]]:
    """Return the shell commands that answer one question with one token."""
    ours = (*PROGRAMS[OURS], str(photo), "--model", str(folder), "-p", QUESTION, "-m", "1")
    given = ("--image", str(photo), "--model", str(folder), "--prompt", QUESTION)
    return {OURS: ours, PEER: (*PROGRAMS[PEER], *given, "--max-tokens", "1")}


def stream_overhead(figures: Results) -> dict[str, float]:
    return {unit: figures["stream"][unit] - figures["bare"][unit] for unit in ("cpu", "wall")}


def time_rows(
    found: dict[str, Results], name: str, group: str, what: str
) -> Iterator[BenchmarkRow]:
    """Yield a result in processor and in clock milliseconds."""
    for unit in ("cpu", "wall"):
        sides = [1e3 * figures[name][unit] for figures in found.values() if name in figures]
        yield BenchmarkRow(group, what, f"{unit} ms", *split_sides(sides))


def memory_rows(found: dict[str, Results], group: str, what: str) -> Iterator[BenchmarkRow]:
    for name, label in PEAKS.items():
        if name in found[OURS]:
            sides = [figures[name] for figures in found.values()]
            yield BenchmarkRow(group, f"{what}, {label}", "MB", *split_sides(sides))


def split_sides(sides: list[float]) -> tuple[float, float | None]:
    return sides[0], sides[1] if len(sides) > 1 else None


def photo_key(name: str) -> str:
    return name.replace(" ", "_")


def as_dict(row: BenchmarkRow) -> dict[str, Any]:
    return {**vars(row), "ratio": row.ratio}
