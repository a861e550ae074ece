"""Whether Metal is there, what the user wants of it, and how a kernel's text becomes a launch."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import UserError

MODE_VARIABLE = "INTERNVL3_KERNELS"
OFF, ON, FORCE = MODES = ("off", "on", "force")
SIMD_WIDTH = 32  # lanes of a simdgroup, on every Apple GPU


@dataclass(frozen=True)
class KernelSource:
    """A kernel's text: ``headers`` and ``body`` are files of shaders/, without their ending."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LaunchConfig:
    """What one call wants. ``grid``: threads, not groups; ``template``: (name, value) pairs."""

    template: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Name the arguments as MLX does."""
        return {
            "template": list(self.template),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": [list(shape) for shape in self.shapes],
            "output_dtypes": list(self.dtypes),
        }


def metal_available() -> bool:
    """Say whether kernels can run: the one place that asks. Tests put an emulator in its stead."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def kernel_mode() -> str:
    """Read INTERNVL3_KERNELS: off, on (where a measured table says that it pays) or force."""
    given = os.environ.get(MODE_VARIABLE, ON).strip().lower() or ON
    if given not in MODES:
        raise UserError(
            f"{MODE_VARIABLE}={given}: it may be {OFF}, {ON} or {FORCE}; leave it out for {ON}"
        )
    return given


def launch_kernel(
    source: KernelSource, inputs: Sequence[mx.array], config: LaunchConfig
) -> list[mx.array]:
    """Start a kernel. Its text is compiled when the result is evaluated, so errors come there."""
    return build_kernel(source)(inputs=list(inputs), **config.kwargs)


@cache
def build_kernel(program: KernelSource) -> Any:
    """Build the kernel once; MLX compiles and keeps a variant for each template and input types."""
    return mx.fast.metal_kernel(
        name=program.name,
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        source=read_shader(program.body),
        header="".join(map(read_shader, program.headers)),
    )


@cache
def read_shader(name: str) -> str:
    """Read a file of shaders/."""
    return (files(__package__) / "shaders" / f"{name}.metal").read_text("ascii")


def device_name() -> str:
    """Name the GPU, as Metal does: Apple M3 Max."""
    if not metal_available():
        return "no Metal device"
    describe = getattr(mx, "device_info", None) or mx.metal.device_info
    return str(describe().get("device_name", "unknown device"))


def warn_user(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


notify: Callable[[str], None] = warn_user


def set_fallback_handler(callback: Callable[[str], None] = warn_user) -> None:
    """Choose where the one line goes that tells of a kernel that is not used."""
    global notify
    notify = callback
