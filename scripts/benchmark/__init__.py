"""Measure what an update costs: ``python -m scripts.benchmark``."""
