"""What an update costs: ``python -m scripts.benchmark``."""
