"""internvl3-mlx against mlx-vlm: one checkpoint, the same tokens, one run."""
