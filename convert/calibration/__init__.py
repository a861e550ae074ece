"""Calibrated quantization: which weights get how many bits, and how they are rounded."""
