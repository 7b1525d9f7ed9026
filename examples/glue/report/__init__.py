"""The report of a folder of runs: ``python -m examples.glue.report``."""
