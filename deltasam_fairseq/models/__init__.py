"""Models and heads that fairseq does not have.

Importing the package registers the model bert.
"""

from deltasam_fairseq.models.bert import BertModel, token_types
from deltasam_fairseq.models.span_head import SPAN_HEAD, SpanHead, register_span_head

__all__ = ["SPAN_HEAD", "BertModel", "SpanHead", "register_span_head", "token_types"]
