"""Metal kernels beside the plain operations that they must reproduce."""

# A checkout has the repository root on its path; a bare import would make a second copy.
if __name__ != "internvl3_mlx.metal_kernels":
    raise ImportError(f"import this package as internvl3_mlx.metal_kernels, not as {__name__}")
