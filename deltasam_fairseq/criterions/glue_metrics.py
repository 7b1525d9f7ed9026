"""GLUE's metrics over all predictions of a validation: Matthews, F1, Pearson, Spearman."""

import warnings
from functools import partial
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from deltasam_fairseq.criterions.meters import GatheringMeter, gather

_METER = "_predictions"  # fairseq does not show meters whose name begins with an underscore


class Predictions(GatheringMeter):
    """Gathers predictions and targets until the metric is asked for."""

    def reset(self) -> None:
        self.predicted: List[float] = []
        self.target: List[float] = []

    def update(self, predicted: Sequence[float], target: Sequence[float]) -> None:
        self.predicted.extend(predicted)
        self.target.extend(target)

    def __len__(self) -> int:
        return len(self.predicted)


def class_ranks(label_dictionary: Any, num_classes: int) -> List[int]:
    """Number of each class in the order of the labels, by number if they are numbers.

    fairseq numbers classes by how often they occur, so that class 0 of MRPC may be label 1.
    Metrics that treat classes differently (F1) need the labels' own order: the positive class is
    the last of two, ``1`` of ``0, 1``, as in GLUE. Labels may be any strings.

    Args:
        label_dictionary: fairseq's dictionary of labels; behind them it has a mask symbol.
        num_classes: number of classes.

    Returns:
        rank of class i, for each class.
    """
    first = label_dictionary.nspecial
    labels = label_dictionary.symbols[first : first + num_classes]
    try:
        order = sorted(range(len(labels)), key=lambda i: float(labels[i]))
    except ValueError:
        order = sorted(range(len(labels)), key=lambda i: labels[i])
    ranks = list(range(num_classes))
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


def matthews(predicted: Any, target: Any) -> float:
    """Matthews correlation; 0 where one class is predicted throughout."""
    return matthews_corrcoef(target, predicted)


def f1(predicted: Any, target: Any, classes: int = 2) -> float:
    """F1 of the positive of two classes; of a task of more, the mean over the classes present."""
    average = "binary" if classes <= 2 else "macro"
    return f1_score(target, predicted, average=average, zero_division=0)


def accuracy(predicted: Any, target: Any) -> float:
    """Share of equal ones."""
    return float(np.mean(np.equal(predicted, target)))


def _correlation(function: Callable[..., Any], predicted: Any, target: Any) -> float:
    # Of a constant it is not defined; NaN would be the best checkpoint for ever.
    if len(set(predicted)) < 2 or len(set(target)) < 2:
        return 0.0
    return float(function(predicted, target)[0])


def pearson(predicted: Any, target: Any) -> float:
    """Pearson correlation; 0 where the predictions are constant."""
    return _correlation(pearsonr, predicted, target)


def spearman(predicted: Any, target: Any) -> float:
    """Spearman rank correlation; 0 where the predictions are constant."""
    return _correlation(spearmanr, predicted, target)


def _mean(*functions: Callable[..., float]) -> Callable[..., float]:
    return lambda *args: sum(function(*args) for function in functions) / len(functions)


# Option of the criterion -> names in the log, as fairseq's sentence_prediction has them.
REPORTS: Dict[str, Dict[str, Callable[..., float]]] = {
    "report_mcc": {"mcc": matthews},
    "report_acc_and_f1": {"acc_and_f1": _mean(accuracy, f1), "f1": f1},
    "report_pearson_and_spearman": {
        "pearson_and_spearman": _mean(pearson, spearman),
        "pearson": pearson,
        "spearman": spearman,
    },
}


def _reports(option: str, classes: int) -> Dict[str, Callable[..., float]]:
    """Return the metrics of an option for a task of so many classes."""
    if option != "report_acc_and_f1":
        return REPORTS[option]
    f1_of_task = partial(f1, classes=classes)
    return {"acc_and_f1": _mean(accuracy, f1_of_task), "f1": f1_of_task}


def log_reports(logging_outputs: Sequence[Dict[str, Any]]) -> None:
    """Log the metrics that the logging outputs ask for, in percent.

    Args:
        logging_outputs: with ``pred`` and ``targ``, lists of numbers, a key of `REPORTS`, and the
            task's number of classes as ``classes`` (default: 2).
    """
    predicted = [x for log in logging_outputs for x in log.get("pred", ())]
    target = [x for log in logging_outputs for x in log.get("targ", ())]
    if not predicted:
        return
    gather(Predictions, _METER, predicted, target)
    classes = max(log.get("classes", 2) for log in logging_outputs)
    for option in REPORTS:
        if any(option in log for log in logging_outputs):
            for name, function in _reports(option, classes).items():
                metrics.log_derived(name, _derived(function))


def _derived(function: Callable[..., float]) -> Callable[[Any], Any]:
    def of_meters(meters: Any) -> Any:
        meter = meters[_METER]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return safe_round(100 * function(meter.predicted, meter.target), 1)

    return of_meters
