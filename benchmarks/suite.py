"""What is measured: groups of rows, each a table of cases."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.environment import without_torch
from benchmarks.photos import write_photo
from benchmarks.probe import PREFILL_TOKENS
from benchmarks.processes import Figures, Python, alternate, present
from benchmarks.prompt import QUESTION
from benchmarks.sides import OURS, PEER

PROGRAMS = {
    OURS: ("-m", "internvl3_mlx", "generate"),
    PEER: ("-m", "benchmarks.peer_command"),
}
HELP = {OURS: ("-m", "internvl3_mlx", "--help"), PEER: ("-m", "mlx_vlm", "generate", "--help")}
PEAKS = {
    "work_mb": "MLX peak beyond weights and pixels",
    "allocator_mb": "MLX peak",
    "resident_mb": "resident peak",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of both sides, in ``unit``; None where mlx-vlm is absent."""

    group: str
    name: str
    unit: str
    ours: float
    peer: float | None

    @property
    def ratio(self) -> float | None:
        """How many times less ours takes; None where a difference is lost in the noise."""
        measured = self.peer is not None and self.ours > 0 and self.peer > 0
        return self.peer / self.ours if measured and self.peer else None


@dataclass(frozen=True)
class Bench:
    """Where files are kept between runs, how often is measured, and which checkpoint stands for
    photos."""

    work: Path
    runs: int = 5
    shape: str = "photo"
    quick: bool = False  # leave out what takes minutes without a good BLAS

    def sizes(self, *names: str) -> tuple[str, ...]:
        return names[:1] if self.quick else names

    def checkpoint(self, name: str) -> Path:
        return write_checkpoint(self.work / name, SHAPES[name])

    def photos(self, *names: str) -> list[Path]:
        return [write_photo(self.work / "photos", name) for name in names]

    def probe(self, task: str, shape: str, *photos: str) -> dict[str, Figures]:
        """Measure a task of ``probe`` on both sides."""
        folder, files = self.checkpoint(shape), self.photos(*photos)
        return alternate(lambda side: Python().probe(task, side, folder, files), self.runs)


def same_input(bench: Bench) -> Iterator[Row]:
    """Refuse to compare programs that read different tokens or pixels."""
    names = bench.sizes("1 tile", "7 tiles", "13 tiles", "1 MP", "12 MP")
    folder, files = bench.checkpoint(bench.shape), bench.photos(*names)
    facts = [Python().probe("same", side, folder, files) for side in present()]
    if any(fact != facts[0] for fact in facts):
        raise RuntimeError("the two sides do not read the same tokens and pixels")
    yield from ()


def startup(bench: Bench) -> Iterator[Row]:
    folder = bench.checkpoint(bench.shape)
    pythons = {
        "with torch installed": Python(),
        "without torch": Python(without_torch(bench.work / "without-torch")),
    }
    for name, python in pythons.items():
        helps = alternate(lambda side, p=python: p.whole(*HELP[side]), bench.runs)
        yield from both(helps, "whole", "Start-up", f"`--help`, {name}")
        imports = alternate(lambda side, p=python: p.probe("import", side, folder), bench.runs)
        yield from both(imports, "import", "Start-up", f"import, {name}")
        for photo in bench.photos(*bench.sizes("1 tile", "13 tiles")):
            words = command(folder, photo)
            shell = alternate(lambda side, p=python, w=words: p.whole(*w[side]), bench.runs)
            what = f"shell to first token, {photo.stem.replace('_', ' ')}, {name}"
            yield from both(shell, "whole", "Start-up", what)


def loading(bench: Bench) -> Iterator[Row]:
    for shape in bench.sizes(bench.shape, "heavy"):
        found = bench.probe("load", shape)
        size = sum(file.stat().st_size for file in bench.checkpoint(shape).glob("*.safetensors"))
        name = f"load, {size / 1e6:.0f} MB of weights"
        yield from both(found, "load", "Loading", name)
        yield from peaks(found, "Loading", name)


def preprocessing(bench: Bench) -> Iterator[Row]:
    found = bench.probe("reading", bench.shape, "1 MP", "12 MP")
    for name in ("1 MP", "12 MP"):
        yield from both(found, f"read {key(name)}", "Preprocessing", f"photo of {name}, 13 tiles")


def tower(bench: Bench) -> Iterator[Row]:
    names = bench.sizes("1 tile", "7 tiles", "13 tiles")
    found = bench.probe("stages", bench.shape, *names)
    for name in names:
        yield from both(found, f"see {key(name)}", "Tower", f"tower and projector, {name}")
    for name in names:
        yield from both(found, f"first {key(name)}", "First token", f"photo to first token, {name}")


def balanced(bench: Bench) -> Iterator[Row]:
    names = bench.sizes("1 tile", "7 tiles")
    found = bench.probe("stages", "balanced", *names)
    for name in names:
        what = f"photo to first token, {name}, larger decoder"
        yield from both(found, f"first {key(name)}", "First token", what)


def prefill(bench: Bench) -> Iterator[Row]:
    found = bench.probe("prefill", bench.shape)
    for count in PREFILL_TOKENS:
        yield from both(found, f"prefill {count}", "Prefill", f"text of {count:,} tokens")


def decode(bench: Bench) -> Iterator[Row]:
    found = bench.probe("decode", "deep")
    yield from both(found, "stream", "Decoding", "a token, 24 tiny layers")
    yield from both(found, "bare", "Decoding", "the same in a bare argmax loop")
    driving = [1e3 * figures["stream"]["thread"] for figures in found.values()]
    yield Row("Decoding", "its part on the driving thread", "ms", *pair(driving))
    added = {side: {"added": differences(figures)} for side, figures in found.items()}
    yield from both(added, "added", "Decoding", "what the program adds to its loop")


def memory(bench: Bench) -> Iterator[Row]:
    cases = {"13 tiles": ("13 tiles",), "26 tiles": ("13 tiles", "1 MP")}
    for name in bench.sizes(*cases):
        photos = cases[name]
        found = bench.probe("memory", bench.shape, *photos)
        yield from peaks(found, "Memory", f"tower, {name}")


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "same": same_input,
    "startup": startup,
    "loading": loading,
    "preprocessing": preprocessing,
    "tower": tower,
    "balanced": balanced,
    "prefill": prefill,
    "decode": decode,
    "memory": memory,
}


def command(folder: Path, photo: Path) -> dict[str, tuple[str, ...]]:
    """Ask one question in the shell, to be answered with one token."""
    ours = (*PROGRAMS[OURS], str(photo), "--model", str(folder), "-p", QUESTION, "-m", "1")
    given = ("--image", str(photo), "--model", str(folder), "--prompt", QUESTION)
    return {OURS: ours, PEER: (*PROGRAMS[PEER], *given, "--max-tokens", "1")}


def differences(figures: Figures) -> dict[str, float]:
    return {unit: figures["stream"][unit] - figures["bare"][unit] for unit in ("cpu", "wall")}


def both(found: dict[str, Figures], name: str, group: str, what: str) -> Iterator[Row]:
    """Give a figure as processor and as clock milliseconds."""
    for unit in ("cpu", "wall"):
        sides = [1e3 * figures[name][unit] for figures in found.values()]
        yield Row(group, what, f"{unit} ms", *pair(sides))


def peaks(found: dict[str, Figures], group: str, what: str) -> Iterator[Row]:
    for name, label in PEAKS.items():
        if name in found[OURS]:
            sides = [figures[name] for figures in found.values()]
            yield Row(group, f"{what}, {label}", "MB", *pair(sides))


def pair(sides: list[float]) -> tuple[float, float | None]:
    return sides[0], sides[1] if len(sides) > 1 else None


def key(name: str) -> str:
    return name.replace(" ", "_")


def as_dict(row: Row) -> dict[str, Any]:
    return {**vars(row), "ratio": row.ratio}
