"""Ways to split text that fairseq does not have.

Importing the package registers the BPE wordpiece.
"""

from deltasam_fairseq.bpe.wordpiece import SPECIAL, WordPieceBPE, WordPieceConfig, read_vocabulary

__all__ = ["SPECIAL", "WordPieceBPE", "WordPieceConfig", "read_vocabulary"]
