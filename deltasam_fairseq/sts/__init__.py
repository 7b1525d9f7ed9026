"""Sentence embeddings: contrastive learning from plain sentences, semantic textual similarity.

Importing the package registers the task sentence_embedding and the criterions nt_xent and
nt_xent_r3f.
"""

from deltasam_fairseq.sts.criterion import NTXentCriterion, NTXentR3FCriterion
from deltasam_fairseq.sts.task import SentenceEmbeddingTask

__all__ = ["NTXentCriterion", "NTXentR3FCriterion", "SentenceEmbeddingTask"]
