"""Check and measure on a GPU: ``scripts/gpu/first_run.sh``."""
