"""Checkpoints on disk: read, remap, build a model from one, write, verify."""
