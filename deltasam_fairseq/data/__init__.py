"""Encoding, files and options of all programs that prepare data."""
