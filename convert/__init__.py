"""Checkpoints in, checkpoints out: names, layouts, quantization, model cards."""

# The repository root is on the path in a checkout; a bare ``import convert`` would make a second copy.
if __name__ != "internvl3_mlx.convert":
    raise ImportError(f"import this room as internvl3_mlx.convert, not as {__name__}")
