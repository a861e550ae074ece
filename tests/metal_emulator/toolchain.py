"""Which compiler this machine has: a system clang, or the one inside PyPI's ziglang."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metal_emulator.errors import CompilerCrashed, NoToolchain

CACHE_VARIABLE = "INTERNVL3_METAL_EMULATOR_CACHE"
CLANG_VARIABLE = "INTERNVL3_METAL_EMULATOR_CLANG"  # "ziglang", or a clang's name or path
OLDEST_CLANG, NEWEST_CLANG = 19, 30
FOLDER = Path(__file__).parent
TARGETS = {
    ("Linux", "x86_64"): ("x86_64-linux-gnu", ("-march=x86-64-v3",)),
    ("Linux", "aarch64"): ("aarch64-linux-gnu", ("-march=armv8.2-a+fp16",)),
    ("Darwin", "arm64"): ("arm64-apple-macosx14.0", ("-mcpu=apple-m1",)),
}
STUBS = (
    *("array", "atomic", "common", "compute", "geometric", "integer", "limits", "logging", "math"),
    *("matrix", "pack", "quadgroup", "relational", "simdgroup", "simdgroup_matrix", "type_traits"),
    *("types", "uniform"),
)
KILLED = {-signal.SIGKILL, 128 + signal.SIGKILL}  # for its memory; the next try may succeed
CRASH_MARKS = ("PLEASE submit a bug report", "PLEASE ATTACH", "Segmentation fault", "LLVM ERROR")
AFTER_COMPILING = {"__init__.py", "arrays.py", "dispatch.py", "mlx_source.py", "standin.py"}


@dataclass(frozen=True)
class Toolchain:
    """A clang, a linker, and the machine they make code for."""

    name: str
    clang: tuple[str, ...]
    linker: tuple[str, ...]
    target: tuple[str, ...]

    def run(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the compiler; it may refuse the text. Raises CompilerCrashed."""
        done = subprocess.run(
            [*self.clang, *arguments], input=text, capture_output=True, text=True, check=False
        )
        self.check_end(done.returncode, done.stderr)
        return done

    def check_end(self, code: int, stderr: str) -> None:
        """Raise CompilerCrashed unless the compiler came to a verdict of its own."""
        if code in KILLED:
            raise RuntimeError(f"{self.name} was killed, probably for its memory")
        if code not in {0, 1} or any(mark in stderr for mark in CRASH_MARKS):
            said = next((line for line in stderr.splitlines() if line.strip()), "no message")
            raise CompilerCrashed(
                f"{self.name} crashed on this kernel (exit code {code}): {said[:200]}; set "
                f"{CLANG_VARIABLE} to another compiler"
            )

    def link(self, out: Path, *objects: Path) -> None:
        """Link a shared library whole or not at all, however many processes do so at once."""
        with aside(out) as unfinished:
            command = [*self.linker, "-o", str(unfinished), *map(str, objects)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoToolchain(f"{self.name} cannot link: {done.stderr[-2000:]}")


@functools.cache
def toolchain() -> Toolchain:
    """Find a compiler, or raise NoToolchain saying what to install."""
    machine = (platform.system(), platform.machine())
    if machine not in TARGETS:
        raise NoToolchain(f"the Metal emulator has no form for {' '.join(machine)}")
    target, flags = TARGETS[machine]
    for name, clang in _compilers():
        linker = _linker(name, clang)
        if linker:
            return Toolchain(name, clang, linker, ("-target", target, *flags))
    raise NoToolchain(
        "the Metal emulator needs a compiler: pip install ziglang, or a system clang 19 or newer"
    )


def _compilers() -> list[tuple[str, tuple[str, ...]]]:
    wanted = os.environ.get(CLANG_VARIABLE)
    found = []
    names = [f"clang-{n}" for n in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)]
    for name in [wanted] if wanted else names:
        if path := shutil.which(name):
            found.append((name, (path,)))
    if wanted in {None, "ziglang"} and (zig := _zig()):
        found.append(("ziglang", (zig, "clang")))
    return found


def _zig() -> str | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("zig")
    return str(path) if path.exists() else None


def _linker(name: str, clang: tuple[str, ...]) -> tuple[str, ...] | None:
    if sys.platform == "darwin":
        linker = "/usr/bin/cc" if shutil.which("/usr/bin/cc") else None
        return (linker, "-dynamiclib", "-undefined", "dynamic_lookup") if linker else None
    if name == "ziglang":
        return (clang[0], "ld.lld", "-shared")
    return (*clang, "-shared")


@functools.cache
def cache_folder() -> Path:
    """Give where compiled kernels are kept: by content, so that nothing there is ever stale."""
    default = Path(tempfile.gettempdir(), f"internvl3-metal-emulator-{os.getuid()}")
    folder = Path(os.environ.get(CACHE_VARIABLE, default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoToolchain(f"{folder} belongs to somebody else: set {CACHE_VARIABLE}")
    (folder / tool_key()).mkdir(exist_ok=True)
    return folder / tool_key()


@functools.cache
def tool_key() -> str:
    """Hash what compiles, where it lies, and the name of its compiler.

    A precompiled header remembers paths: a second checkout must not take the first one's.
    """
    sources = [p for p in sorted(FOLDER.rglob("*")) if p.suffix in {".py", ".h", ".cpp", ""}]
    text = b"".join(
        p.read_bytes() for p in sources if p.is_file() and p.name not in AFTER_COMPILING
    )
    version = toolchain().run("--version").stdout
    return hashlib.sha256(text + f"{FOLDER} {version}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to; it takes the name when it is whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@functools.cache
def stub_folder() -> Path:
    """Give a folder in which <metal_math> and the others only include <metal_stdlib>."""
    folder = cache_folder() / "include"
    folder.mkdir(exist_ok=True)
    texts = {f"metal_{name}": "#pragma once\n#include <metal_stdlib>\n" for name in STUBS}
    texts["metal_stdlib"] = (FOLDER / "shim" / "metal_stdlib").read_text("utf-8")
    for name, text in texts.items():
        if not (folder / name).exists():
            with aside(folder / name) as unfinished:
                unfinished.write_text(text, "utf-8")
    return folder
