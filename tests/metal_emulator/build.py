"""From Metal text to a shared library, kept by content.

text -> clang -E -> rewrite -> C++ for OpenCL -> LLVM IR -> lint -> instrument -> clang -O2
"""

import ctypes
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx

from metal_emulator.arithmetic import with_counters
from metal_emulator.errors import CompilerCrashed, KernelRefused, NoToolchain
from metal_emulator.instrument import instrument, without_marks
from metal_emulator.lint import lint
from metal_emulator.rewrite import base_name, entry_point, rewrite
from metal_emulator.signature import Parameter
from metal_emulator.toolchain import FOLDER, aside, cache_folder, stub_folder, toolchain

MLX_HEADERS = Path(next(iter(mlx.__path__)), "include")
METAL_VERSION = 310
LANGUAGE = ("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-w")
MACHINE = (
    *("-fPIC", "-Xclang", "-ffake-address-space-map", "-cl-single-precision-constant"),
    # every extension, so that targets do not differ, and no double
    *("-Xclang", "-cl-ext=+all,-cl_khr_fp64,-__opencl_c_fp64", "-Xclang", "-fno-validate-pch"),
    # each operation on half and bfloat rounds, as on the GPU; no fused multiply-add unasked
    *("-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *("-O1", "-gline-tables-only", "-ftrivial-auto-var-init=pattern", "-fno-sanitize-recover=all"),
    "-fsanitize=array-bounds,integer-divide-by-zero",
    *("-Xclang", "-disable-llvm-passes"),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run: its library, parameters, and the places that it accesses memory at."""

    library: ctypes.CDLL
    parameters: tuple[Parameter, ...]
    sites: tuple[str, ...]
    checked: bool
    counted: bool = False


def compile_kernel(
    text: str,
    name: str,
    constants: Mapping[int, bool | int | float] | None = None,
    checked: bool = True,
    counted: bool = False,
) -> Compiled:
    """Compile the kernel that ``name`` is the host name of, or raise KernelRefused.

    ``constants``: the pipeline's function constants. ``checked=False`` leaves memory unwatched;
    ``counted`` counts arithmetic instead.
    """
    checked = checked and not counted
    key = repr((text, name, sorted((constants or {}).items()), checked, counted, mlx_version()))
    stem = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:24]
    facts = stem.with_suffix(".json")
    if not facts.exists():
        mode = {"checked": checked, "counted": counted}
        described = _build(stem.with_suffix(".so"), text, name, dict(constants or {}), mode)
        with aside(facts) as unfinished:
            unfinished.write_text(json.dumps(described), "utf-8")
    return _loaded(stem)


@functools.cache
def _loaded(stem: Path) -> Compiled:
    facts = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    if "refused" in facts:
        raise KernelRefused(facts["refused"])
    parameters = tuple(Parameter(**parameter) for parameter in facts["parameters"])
    runtime()  # the kernel's library calls it
    library = ctypes.CDLL(str(stem.with_suffix(".so")))
    sites = tuple(facts["sites"])
    return Compiled(library, parameters, sites, facts["checked"], facts["counted"])


def _build(
    out: Path,
    text: str,
    name: str,
    constants: dict[int, bool | int | float],
    mode: dict[str, bool],
) -> dict[str, object]:
    """Build the library; returns what to remember of it, which may be why it is refused."""
    try:
        ir, parameters = to_ir(text, name, constants)
        ir, sites = instrument(ir) if mode["checked"] else (without_marks(ir), [])
        ir = with_counters(optimized(ir)) if mode["counted"] else ir
        with tempfile.TemporaryDirectory() as folder:
            toolchain().link(out, assemble(ir, Path(folder, "kernel.o")))
    except KernelRefused as refusal:
        return {"refused": str(refusal)}
    described = [asdict(parameter) for parameter in parameters]
    return {"parameters": described, "sites": sites, **mode}


def to_ir(
    text: str, name: str, constants: Mapping[int, bool | int | float]
) -> tuple[str, list[Parameter]]:
    """Compile one kernel of the text to LLVM IR, not optimised; gives its parameters too."""
    rewritten = rewrite(preprocess(text), constants)
    expression = rewritten.instances.get(name, name)
    if base_name(expression) not in rewritten.kernels:
        known = sorted({*rewritten.kernels, *rewritten.instances})
        raise KernelRefused(f"there is no kernel '{name}' among {known}")
    parameters = rewritten.kernels[base_name(expression)]
    return _front_end(rewritten.text + entry_point(expression, parameters), text), parameters


def preprocess(text: str) -> str:
    """Expand the text's macros and includes; MLX's own headers are found."""
    if not text.isascii():
        raise KernelRefused("the source is not ASCII, and MLX hands it to Metal as ASCII")
    done = toolchain().run(
        *LANGUAGE, *toolchain().target, "-E", "-D__METAL__=1", "-DMLX_METAL_JIT",
        f"-D__METAL_VERSION__={METAL_VERSION}", f"-I{stub_folder()}", f"-I{MLX_HEADERS}", "-",
        text=text,
    )  # fmt: skip
    if done.returncode:
        raise KernelRefused(_errors(done.stderr))
    return done.stdout


def _front_end(text: str, original: str) -> str:
    """Compile to LLVM IR and read the syntax tree for what Metal refuses, both at once."""
    own = {*re.findall(r'^# \d+ "([^"/]+)"', original, re.M), "<stdin>"}
    with tempfile.NamedTemporaryFile("w", suffix=".clcpp", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flags = [*LANGUAGE, *toolchain().target, *MACHINE, "-include-pch", str(precompiled())]
        start = [*toolchain().clang, *flags]
        tree = subprocess.Popen(
            [*start, "-fsyntax-only", "-Xclang", "-ast-dump", file.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ir = toolchain().run(*flags, "-S", "-emit-llvm", "-o", "-", file.name)
        dumped, complaint = tree.communicate()
    if ir.returncode:
        raise KernelRefused(_errors(ir.stderr, own))
    toolchain().check_end(tree.returncode, complaint)  # half a tree would pass for a clean one
    if found := lint(dumped, ir.stdout, own):
        raise KernelRefused("\n".join(found))
    return ir.stdout


def _errors(diagnostics: str, own: Set[str] = frozenset()) -> str:
    """Keep clang's errors; one inside the shim is shown where the kernel's text led to it."""
    lines = diagnostics.splitlines()
    errors = []
    for index, line in enumerate(lines):
        if ": error: " not in line:
            continue
        place, message = line.split(": error: ", 1)
        following = itertools.takewhile(lambda text: ": error: " not in text, lines[index + 1 :])
        notes = [text for text in following if ": note: " in text]
        led_here = [text.split(": note: ")[0] for text in notes if text.split(":")[0] in own]
        if place.split(":")[0] not in own and led_here:
            place = led_here[0]
        errors.append(f"{place}: error: {message}")
    return "\n".join(errors or lines)


def optimized(ir: str) -> str:
    """Optimize LLVM IR: inlined and unrolled, not vectorized."""
    done = toolchain().run(
        "-x", "ir", "-O1", "-S", "-emit-llvm", "-fno-vectorize", "-fno-slp-vectorize",
        "-Wno-override-module", *toolchain().target, "-o", "-", "-", text=ir,
    )  # fmt: skip
    if done.returncode:
        raise KernelRefused(_errors(done.stderr))
    return done.stdout


def assemble(ir: str, out: Path) -> Path:
    """Compile LLVM IR to an object file."""
    done = toolchain().run(
        "-x", "ir", "-O2", "-fPIC", "-c", "-Wno-override-module", *toolchain().target,
        "-o", str(out), "-", text=ir,
    )  # fmt: skip
    if done.returncode:
        raise KernelRefused(_errors(done.stderr))
    return out


@functools.cache
def precompiled() -> Path:
    """Precompile the shim once."""
    out = cache_folder() / "msl.pch"
    if not out.exists():
        with aside(out) as unfinished:
            try:
                done = toolchain().run(
                    *LANGUAGE, *toolchain().target, *MACHINE, "-Xclang", "-emit-pch", "-c",
                    "-o", str(unfinished), str(FOLDER / "shim" / "msl.h"),
                )  # fmt: skip
            except CompilerCrashed as crash:  # not the fault of the kernel at hand
                raise NoToolchain(f"cannot compile the shim: {crash}") from crash
            if done.returncode:
                raise NoToolchain(f"cannot compile the shim: {done.stderr[-2000:]}")
    return out


@functools.cache
def runtime() -> ctypes.CDLL:
    """Compile and load the runtime; kernels find its functions among the process's own."""
    out = cache_folder() / "runtime.so"
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            toolchain().link(out, *runtime_objects(Path(folder)))
    ctypes.CDLL(None, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL)


def runtime_objects(folder: Path) -> list[Path]:
    """Compile the runtime's files to objects in the folder."""
    objects = []
    for source in sorted((FOLDER / "runtime").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        done = toolchain().run(
            "-std=c++17", "-O2", "-fPIC", "-ffreestanding", "-ffp-contract=off",
            *toolchain().target, "-c", "-o", str(objects[-1]), str(source),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
    return objects


@functools.cache
def reason_to_skip() -> str | None:
    """Say why no kernel runs on this machine, for tests to skip.

    None where kernels run, and on Linux: there the compiler is a requirement of the tests.
    """
    return None if sys.platform == "linux" else _why_unusable()


def _why_unusable() -> str | None:
    text = "[[kernel]] void nothing(device float* x) { x[0] = 1; }"
    try:
        toolchain()
        compile_kernel(text, "nothing")
    except (KernelRefused, NoToolchain, OSError, RuntimeError) as error:
        return f"the Metal emulator does not work here: {error}"
    return None


@functools.cache
def mlx_version() -> str:
    import mlx.core as mx

    return mx.__version__
