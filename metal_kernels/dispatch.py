"""Find out whether Metal is available, read the user's setting, and launch kernels."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from internvl3_mlx.device import gpu_info, on_gpu
from internvl3_mlx.errors import UserError

MODE_VARIABLE = "INTERNVL3_KERNELS"
OFF, ON, FORCE = MODES = ("off", "on", "force")
SIMD_WIDTH = 32  # lanes of a simdgroup, on every Apple GPU
# MLX passes an input of fewer elements in constant memory, which is another text of the kernel
MIN_DEVICE_ELEMENTS = 8


@dataclass(frozen=True)
class KernelSource:
    """Where a kernel's text is: ``headers`` and ``body`` name files of shaders/ without suffix."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of one launch. ``grid``: threads, not groups; ``template``: (name, value) pairs."""

    template: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of MLX's kernel call."""
        return {
            "template": list(self.template),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": [list(shape) for shape in self.shapes],
            "output_dtypes": list(self.dtypes),
        }


def metal_available() -> bool:
    """Return whether kernels can run. Tests replace this function to run the emulator."""
    return mx.metal.is_available() and on_gpu()


@cache
def kernel_mode() -> str:
    """Return what INTERNVL3_KERNELS says; read once, as layers ask for every token."""
    return read_kernel_mode()


def read_kernel_mode() -> str:
    """Read INTERNVL3_KERNELS: off, on (where measured to be faster) or force. Raises UserError."""
    given = os.environ.get(MODE_VARIABLE, ON).strip().lower() or ON
    if given not in MODES:
        raise UserError(
            f"{MODE_VARIABLE}={given} is not a mode; choose from {', '.join(MODES)}, or unset it"
        )
    return given


def launch_kernel(
    source: KernelSource, inputs: Sequence[mx.array], config: LaunchConfig
) -> list[mx.array]:
    """Add a kernel to the graph. It is compiled when its result is evaluated: errors come then."""
    return build_kernel(source)(inputs=list(inputs), **config.kwargs)


@cache
def build_kernel(source: KernelSource) -> Any:
    """Build a kernel once; MLX compiles one variant for each template and input dtypes."""
    return mx.fast.metal_kernel(
        name=source.name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=read_shader(source.body),
        header="".join(map(read_shader, source.headers)),
    )


@cache
def read_shader(name: str) -> str:
    """Return the text of a file of shaders/."""
    return (files(__package__) / "shaders" / f"{name}.metal").read_text("ascii")


@lru_cache(maxsize=64)
def scalar_array(value: float, dtype: mx.Dtype) -> mx.array:
    """Return a 0-d array, the same one for every layer."""
    return mx.array(value, dtype)


def device_name() -> str:
    """Return Metal's name of the GPU, such as Apple M3 Max."""
    if not metal_available():
        return "no Metal device"
    return str(gpu_info().get("device_name", "unknown device"))


def architecture() -> str:
    """Return Metal's name of the GPU's architecture, such as applegpu_g15s."""
    return str(gpu_info().get("architecture", "unknown architecture"))


def warn_user(line: str) -> None:
    """Show a line as a Python warning."""
    warnings.warn(line, RuntimeWarning, stacklevel=2)


notify: Callable[[str], None] = warn_user


def set_fallback_handler(callback: Callable[[str], None] = warn_user) -> None:
    """Set the function that reports, in one line, a kernel that is not used."""
    global notify
    notify = callback
