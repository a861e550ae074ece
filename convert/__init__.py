"""Conversion of checkpoints: layouts, quantization, calibration, model cards."""

# A checkout has the repository root on its path; a bare import would make a second copy.
if __name__ != "internvl3_mlx.convert":
    raise ImportError(f"import this package as internvl3_mlx.convert, not as {__name__}")
