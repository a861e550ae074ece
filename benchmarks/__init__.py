"""internvl3-mlx beside mlx-vlm: one checkpoint, the same tokens, one run."""
