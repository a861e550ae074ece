"""Serve loaded models to several clients at once: the engine, and the HTTP APIs over it."""
