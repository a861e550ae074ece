"""Compilers and the cache of compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from metal_emulator import KernelRefused, NoToolchain, build, compile_kernel, reason_to_skip
from metal_emulator.errors import CompilerCrashed
from metal_emulator.instrument import instrument
from metal_emulator.toolchain import (
    CACHE_VARIABLE,
    CLANG_VARIABLE,
    TARGETS,
    cache_folder,
    stub_folder,
    tool_key,
    toolchain,
)
from test_metal_emulator.bodies import around
from test_metal_emulator.mlx_kernels import CASES

TESTS = Path(__file__).parents[1]
ELF, MACH_O = b"\x7fELF", b"\xcf\xfa\xed\xfe"
MACHINE_NUMBERS = {"x86_64": b"\x3e\x00", "aarch64": b"\xb7\x00", "arm64": b"\x0c\x00"}
PROGRAM = """
import sys, numpy as np
from metal_emulator import Binding, KernelRefused, compile_kernel, dispatch
wrong, right = open(sys.argv[1]).read(), open(sys.argv[2]).read()
kernel = compile_kernel(right, "kernel_under_test")
y = Binding(np.zeros(32, np.float32), True, False)
bound = {0: Binding(np.ones(32, np.float32)), 1: y, 2: Binding(np.ones(1, np.float32))}
print(dispatch(kernel, bound, (32, 1, 1), (32, 1, 1)).outputs[1].sum())
try:
    compile_kernel(wrong, "kernel_under_test")
except KernelRefused as refusal:
    print(refusal)
"""


@pytest.fixture
def texts(tmp_path):
    """Write a wrong and a right kernel to files."""
    wrong = "y[i] = half(1) + bfloat(1.0f);"
    paths = [tmp_path / "wrong.metal", tmp_path / "right.metal"]
    for path, body in zip(paths, (wrong, "y[i] = simd_max(x[i]);"), strict=True):
        path.write_text(around(body))
    return [str(path) for path in paths]


def start(texts: list[str], cache: Path, clang: str | None = None) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), CACHE_VARIABLE: str(cache)}
    if clang:
        environment[CLANG_VARIABLE] = clang
    command = [sys.executable, "-c", PROGRAM, *texts]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen) -> list[str]:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return output.splitlines()


def test_processes_that_share_an_empty_cache_do_not_disturb_each_other(texts, tmp_path):
    cache = tmp_path / "cache"
    started = [start(texts, cache) for _ in range(3)]
    sums, refusals = zip(*(said(process) for process in started), strict=True)
    assert set(sums) == {"32.0"}
    assert len(set(refusals)) == 1
    names = [path.name for path in cache.rglob("*") if path.is_file()]
    assert sum(name.endswith(".json") for name in names) == 2
    assert {Path(name).suffix for name in names} <= {".json", ".so", ".pch", ""}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one compiler is enough")
def test_the_compiler_that_the_test_extra_brings_is_enough(texts, tmp_path):
    first, second = said(start(texts, tmp_path / "cache", "ziglang"))
    assert first == "32.0"
    assert second.startswith("body.metal:1: error: half and bfloat do not mix")


@pytest.mark.parametrize("machine", TARGETS, ids=" ".join)
def test_every_machine_that_we_name_gets_its_code(machine, monkeypatch, tmp_path):
    cached = (toolchain, tool_key, cache_folder, stub_folder, build.precompiled)
    for function in cached:
        function.cache_clear()
    try:
        with monkeypatch.context() as there:
            there.setattr("platform.system", lambda: machine[0])
            there.setattr("platform.machine", lambda: machine[1])
            there.setenv(CACHE_VARIABLE, str(tmp_path))
            case = CASES["prefill attention, bool mask"]("bfloat16")
            ir, _ = build.to_ir(case.text, "case", case.constants)
            made = build.assemble(instrument(ir)[0], tmp_path / "kernel.o")
            kinds = {path.read_bytes()[:20] for path in [made, *build.runtime_objects(tmp_path)]}
    finally:
        for function in cached:
            function.cache_clear()
    apple, number = machine[0] == "Darwin", MACHINE_NUMBERS[machine[1]]
    assert {kind[:4] for kind in kinds} == {MACH_O if apple else ELF}
    assert {kind[4:6] if apple else kind[18:20] for kind in kinds} == {number}


def test_a_machine_without_a_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv(CLANG_VARIABLE, "no-such-clang")
    toolchain.cache_clear()
    try:
        with pytest.raises(
            NoToolchain, match=r"pip install ziglang, or a system clang 19 or newer"
        ):
            toolchain()
        monkeypatch.setattr(sys, "platform", "darwin")
        assert "pip install ziglang" in reason_to_skip.__wrapped__()
        monkeypatch.setattr(sys, "platform", "linux")
        assert reason_to_skip.__wrapped__() is None
    finally:
        toolchain.cache_clear()


def test_a_machine_of_another_kind_is_named(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    toolchain.cache_clear()
    try:
        with pytest.raises(NoToolchain, match="no form for .* riscv64"):
            toolchain()
    finally:
        toolchain.cache_clear()


CACHED = (toolchain, tool_key, cache_folder, stub_folder, build.precompiled)


@pytest.fixture
def crashing(tmp_path, monkeypatch):
    """Give a clang that crashes where a word is among its arguments; each crash is a line."""
    real = " ".join(toolchain().clang)

    def crash_at(word, code, message="PLEASE submit a bug report"):
        script = tmp_path / "clang"
        script.write_text(
            f'#!/bin/sh\nfor word in "$@"; do\n  if [ "$word" = {word} ]; then\n'
            f'    echo crash >> {tmp_path}/crashes; echo "{message}" >&2; exit {code}\n  fi\ndone\n'
            f'exec {real} "$@"\n'
        )
        script.chmod(0o755)
        for function in CACHED:
            function.cache_clear()
        monkeypatch.setenv(CLANG_VARIABLE, str(script))
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        return lambda: len((tmp_path / "crashes").read_text().splitlines())

    yield crash_at
    for function in CACHED:
        function.cache_clear()


@pytest.mark.parametrize("word", ["-emit-llvm", "-ast-dump"])
@pytest.mark.parametrize(("code", "message"), [(139, "bad address"), (1, "PLEASE submit a bug")])
def test_a_kernel_that_crashes_the_compiler_is_refused_for_good(crashing, word, code, message):
    if code == 1:
        message = "PLEASE submit a bug report"
    crashes = crashing(word, code, message)
    text = around("y[i] = 2 * x[i];")
    for _ in range(2):
        with pytest.raises(KernelRefused, match="crashed on this kernel") as refusal:
            compile_kernel(text, "kernel_under_test")
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert crashes() == 1


def test_a_compiler_that_was_killed_is_tried_again(crashing):
    crashes = crashing("-emit-llvm", 137)
    for tries in (1, 2):
        with pytest.raises(RuntimeError, match="was killed, probably for its memory"):
            compile_kernel(around("y[i] = 3 * x[i];"), "kernel_under_test")
        assert crashes() == tries


def test_a_compiler_that_cannot_compile_the_shim_is_no_compiler(crashing):
    crashes = crashing("-emit-pch", 139)
    for tries in (1, 2):
        with pytest.raises(NoToolchain, match="cannot compile the shim: .*crashed"):
            compile_kernel(around("y[i] = 4 * x[i];"), "kernel_under_test")
        assert crashes() == tries
    assert issubclass(CompilerCrashed, KernelRefused)
