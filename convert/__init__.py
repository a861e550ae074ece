"""Checkpoints in, checkpoints out: names, layouts, quantization, model cards."""

# A checkout has the repository root on its path; a bare import would make a second copy.
if __name__ != "internvl3_mlx.convert":
    raise ImportError(f"import this room as internvl3_mlx.convert, not as {__name__}")
