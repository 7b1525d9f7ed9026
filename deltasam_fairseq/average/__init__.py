"""Average the checkpoints of a run: ``python -m deltasam_fairseq.average``."""
