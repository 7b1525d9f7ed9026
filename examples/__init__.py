"""Whole experiments, each with one command: entry points, nothing to import from elsewhere."""
