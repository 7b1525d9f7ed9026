"""Question answering as SQuAD has it: data, task, criterion, metrics, answers.

Importing the package registers the task and the criterion span_prediction.
"""

from deltasam_fairseq.squad.criterion import SpanPredictionCriterion
from deltasam_fairseq.squad.task import SpanPredictionTask

__all__ = ["SpanPredictionCriterion", "SpanPredictionTask"]
