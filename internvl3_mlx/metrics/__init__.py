"""Metrics of benchmarks: answers found in a text, scores of one answer, statistics of many."""
