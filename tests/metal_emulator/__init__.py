"""Metal kernels on the CPU: compiled strictly, run with every access watched.

    from metal_emulator import emulated_metal

    with emulated_metal() as metal:
        y = scaled_rows(x)                  # calls mx.fast.metal_kernel, as on a Mac
    assert metal.last.reads["x"].total == x.nbytes

While the context lasts ``mx.fast.metal_kernel`` makes kernels that run here. Each call

- writes the Metal text that MLX would, and holds it against the text that MLX itself prints;
- compiles it with clang as C++ for OpenCL and refuses what Metal refuses (KernelRefused);
- runs it in three orders of threads, which must agree to the bit;
- raises KernelFault, with the file, line and column in the kernel's own text, for an access out of
  bounds or misaligned, a write to an input, a race, unset memory, an output left unwritten, threads
  that part at a barrier or at a simdgroup operation, a shuffle from an inactive lane, a matrix
  operation without all 32 lanes, and for what exceeds Metal's limits;
- leaves a ``Dispatch`` in ``metal.dispatches``: bytes read and written by buffer, lines of the
  GPU's cache that the loads of simdgroups touch, and the findings.

With ``counted=True`` nothing is watched, and the arithmetic that threads do is counted.

Kernel objects made before the context are MLX's own: make them inside, or clear what caches them.
Lines are counted in the author's text: ``name.metal:3:7`` is line 3 of ``source``, ``name.header``
is ``header``. Compiled kernels are kept by content below the system's temporary folder, or in
$INTERNVL3_METAL_EMULATOR_CACHE. The compiler is a system clang of 19 or newer, or PyPI's ziglang;
$INTERNVL3_METAL_EMULATOR_CLANG names one.

What it cannot tell: speed, registers and the thread limit that they set, the accuracy of ``fast::``
functions, the order in which the GPU adds within a simdgroup or a matrix, Apple's compiler's bugs.
"""

from metal_emulator.build import Compiled, compile_kernel, reason_to_skip
from metal_emulator.dispatch import Binding, Reads, Run, dispatch
from metal_emulator.errors import KernelError, KernelFault, KernelRefused, NoToolchain
from metal_emulator.standin import Dispatch, Emulation, emulated_metal
from metal_emulator.toolchain import Toolchain, toolchain

__all__ = [
    "Binding",
    "Compiled",
    "Dispatch",
    "Emulation",
    "KernelError",
    "KernelFault",
    "KernelRefused",
    "NoToolchain",
    "Reads",
    "Run",
    "Toolchain",
    "compile_kernel",
    "dispatch",
    "emulated_metal",
    "reason_to_skip",
    "toolchain",
]
