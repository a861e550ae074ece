"""Find NaN and infinities in weights, about as fast as memory can be read."""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.device import on_cpu
from internvl3_mlx.errors import CheckpointError

# safetensors' dtype -> integers of its width, and the exponent bits, all of which are ones in a
# value that is NaN or infinite
FLOAT_BITS = {
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
}
MLX_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
WORDS = {"F32": mx.uint32, "F16": mx.uint16, "BF16": mx.uint16}


def is_finite(x: NDArray[np.generic], dtype: str) -> bool:
    """Tell whether all values are finite. x: the values or their bits, of a safetensors ``dtype``.

    Among integers of the same bits, values that are not finite are the largest: the positive ones
    if the integers are signed, the negative ones if they are not. Finding a maximum needs no
    temporary array.
    """
    if dtype not in FLOAT_BITS or x.size == 0:
        return True
    signed, unsigned, exponent = FLOAT_BITS[dtype]
    sign = 1 << (8 * x.itemsize - 1)
    return bool(x.view(signed).max() < exponent and x.view(unsigned).max() < sign | exponent)


def all_finite(arrays: Iterable[mx.array]) -> bool:
    """Tell whether all values of some evaluated arrays are finite; integers always are."""
    floats = [x for x in arrays if x.dtype in MLX_NAMES]
    if not on_cpu():
        return bool(mx.all(mx.array([mx.isfinite(x).all() for x in floats])))
    return all(is_finite(_bits(x), MLX_NAMES[x.dtype]) for x in floats)


def _bits(x: mx.array) -> NDArray[np.generic]:
    return np.array(x.view(WORDS[MLX_NAMES[x.dtype]]), copy=False)


def check_finite(x: NDArray[np.generic], dtype: str, name: str) -> None:
    """Raise CheckpointError when ``x``, in the bits of ``dtype``, holds NaN or infinity."""
    if not is_finite(x, dtype):
        raise not_finite_error(name)


def not_finite_error(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} contains NaN or infinite values: its file is damaged, or the dtype too narrow; "
        "download the model again, or choose another dtype"
    )
