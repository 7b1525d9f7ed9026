"""Tasks that fairseq does not have.

Importing the package registers the task span_prediction.
"""

from deltasam_fairseq.tasks.span_prediction import SpanPredictionTask

__all__ = ["SpanPredictionTask"]
