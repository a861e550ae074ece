"""Evaluate a model on benchmarks and on data of your own, and compare two evaluations."""
