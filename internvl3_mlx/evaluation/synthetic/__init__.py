"""Rendered images with known answers: they show faults of tiles, resizing, prompts and weights."""
