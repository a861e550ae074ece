"""Compilers and the cache of compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from metal_emulator import NoToolchain, build, reason_to_skip
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
