"""Nested parameter trees, as MLX modules hold them, and flat dictionaries of arrays."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Tree = Any
Arrays = dict[str, mx.array]  # by dotted name


def named_arrays(tree: Tree) -> list[tuple[str, mx.array]]:
    """List the arrays of a tree with their dotted names."""
    found: Any = tree_flatten(tree)
    arrays: list[tuple[str, mx.array]] = found
    return arrays


def as_float(x: mx.array) -> float:
    """Return the value of a scalar array; evaluates it."""
    value: Any = x.item()
    return float(value)
