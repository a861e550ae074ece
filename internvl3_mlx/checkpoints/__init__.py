"""Checkpoints on disk: read, remapped, built into a model, written, verified."""
