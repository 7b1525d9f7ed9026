"""Models that fairseq does not have.

Importing the package registers the model bert.
"""

from deltasam_fairseq.models.bert import BertModel, token_types

__all__ = ["BertModel", "token_types"]
