"""The built-in case: ``make demo``."""
