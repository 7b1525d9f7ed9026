"""Prints the path to give to fairseq's ``--user-dir``: ``$(python -m deltasam_fairseq)``."""

import os

print(os.path.dirname(os.path.abspath(__file__)))
