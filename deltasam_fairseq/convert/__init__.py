"""Hugging Face to fairseq and back: ``python -m deltasam_fairseq.convert``."""
