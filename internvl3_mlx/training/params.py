"""Trees of arrays, as MLX nests the parameters of a module."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Tree = Any
Arrays = dict[str, mx.array]  # by their dotted names


def named_arrays(tree: Tree) -> list[tuple[str, mx.array]]:
    """List a tree's arrays with their dotted names."""
    found: Any = tree_flatten(tree)
    arrays: list[tuple[str, mx.array]] = found
    return arrays


def as_float(x: mx.array) -> float:
    """Take the one number of an array."""
    value: Any = x.item()
    return float(value)
