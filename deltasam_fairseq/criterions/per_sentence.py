"""Per-sentence losses of fairseq's stock criterions, and of a user's own.

A criterion takes part in delta-SAM by a method

    def per_sentence_losses(self, model, sample):
        ...
        return losses, sample_size, logging_output

which is its ``forward`` with the loss of every sentence, shape (B,), instead of their sum.
fairseq's stock criterions have no such method; the functions below stand in for it without a
second copy of their code: the criterion runs as it is, and only its last reduction is made here.
"""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Type

import torch
import torch.nn.functional as F
from fairseq import modules
from fairseq.criterions import FairseqCriterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.criterions.sentence_ranking import SentenceRankingCriterion
from torch import Tensor

from deltasam_fairseq.algorithms import at_least_float32, sum_tokens, unit_roundoff
from deltasam_fairseq.core.rng_replay import furthest_off

# How far the sum of the losses may be from the criterion's own in float32, relative.
_ADDED_UP = 1e-4


class PerSentence(NamedTuple):
    """What a criterion's forward returns, with the loss of every sentence.

    Attributes:
        losses: ``l_j``, shape (B,); for token-level criterions the sum over the sentence's
            target tokens. Their sum is the criterion's loss.
        sample_size: as fairseq's ``forward`` returns it.
        logging_output: as fairseq's ``forward`` returns it.
    """

    losses: Tensor
    sample_size: Any
    logging_output: Dict[str, Any]


def detached(output: Any) -> Any:
    """Return a model's output with all of its tensors detached."""
    if torch.is_tensor(output):
        return output.detach()
    if hasattr(output, "_fields"):  # a NamedTuple
        return type(output)(*map(detached, output))
    if isinstance(output, (tuple, list)):
        return type(output)(detached(o) for o in output)
    if isinstance(output, dict):
        return {k: detached(v) for k, v in output.items()}
    return output


class _RecordingModel:
    """Stands for the model in a criterion's forward and keeps what the model returns.

    The criterion gets the outputs detached: it computes its loss and its metrics without a
    graph, and the only graph that lives is that of the per-sentence losses.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.outputs: List[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        self.outputs.append(output)
        return detached(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _sentence_prediction(criterion: Any, model: Any, sample: Dict[str, Any]) -> PerSentence:
    recorder = _RecordingModel(model)
    _, sample_size, logging_output = criterion.forward(recorder, sample)
    logits = at_least_float32(recorder.outputs[0][0])
    targets = model.get_targets(sample, [logits]).view(-1)
    if criterion.regression_target:
        errors = F.mse_loss(logits.view(-1), targets.to(logits), reduction="none")
        losses = errors.view(logits.size(0), -1).sum(dim=1)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    return PerSentence(losses, sample_size, logging_output)


def _sentence_ranking(criterion: Any, model: Any, sample: Dict[str, Any]) -> PerSentence:
    recorder = _RecordingModel(model)
    _, sample_size, logging_output = criterion.forward(recorder, sample)
    logits = at_least_float32(torch.cat([output[0] for output in recorder.outputs], dim=1))
    targets = model.get_targets(sample, [logits]).view(-1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return PerSentence(losses, sample_size, logging_output)


def _masked_lm(criterion: Any, model: Any, sample: Dict[str, Any]) -> PerSentence:
    recorder = _RecordingModel(model)
    _, sample_size, logging_output = criterion.forward(recorder, sample)
    logits = recorder.outputs[0][0]
    target = model.get_targets(sample, [logits])
    masked = target.ne(criterion.padding_idx)
    if logits.numel() // logits.size(-1) == target.numel():
        masked = torch.ones_like(masked)  # no token of the batch is masked: all are projected
    token_losses = modules.cross_entropy(
        logits.view(-1, logits.size(-1)),
        target[masked],
        reduction="none",
        ignore_index=criterion.padding_idx,
    )
    grid = token_losses.new_zeros(target.shape).masked_scatter(masked, token_losses)
    return PerSentence(sum_tokens(grid), sample_size, logging_output)


def _token_level(criterion: Any, model: Any, sample: Dict[str, Any]) -> PerSentence:
    """Criterions whose ``forward(reduce=False)`` returns the loss of every target token."""
    losses, sample_size, logging_output = criterion.forward(model, sample, reduce=False)
    losses = sum_tokens(losses.view(sample["target"].size(0), -1))
    logging_output = {
        key: value.sum() if torch.is_tensor(value) else value
        for key, value in logging_output.items()
    }
    return PerSentence(losses, sample_size, logging_output)


# Exact types: a subclass may have another loss.
_STOCK: Dict[Type[FairseqCriterion], Callable[[Any, Any, Dict[str, Any]], PerSentence]] = {
    SentencePredictionCriterion: _sentence_prediction,
    SentenceRankingCriterion: _sentence_ranking,
    MaskedLmLoss: _masked_lm,
    CrossEntropyCriterion: _token_level,
    LabelSmoothedCrossEntropyCriterion: _token_level,
}


def has_per_sentence_losses(criterion_class: type) -> bool:
    """Whether criterions of this class can return the loss of every sentence."""
    return criterion_class in _STOCK or hasattr(criterion_class, "per_sentence_losses")


def per_sentence_losses(
    criterion: FairseqCriterion, model: torch.nn.Module, sample: Dict[str, Any]
) -> PerSentence:
    """Forward of ``criterion`` with the loss of every sentence instead of their sum.

    Args:
        criterion: one of fairseq's stock criterions, or one with a method
            ``per_sentence_losses(model, sample)``.
        model: the model, in whatever data-parallel wrapper.
        sample: a mini-batch of B sentences; it is not changed.

    Returns:
        a `PerSentence`; its ``losses`` have shape (B,) and carry the graph where gradients are
        enabled.

    Raises:
        TypeError: for a criterion that has no per-sentence losses.
        ValueError: if a criterion's own method returns losses of another shape than (B,).
    """
    own = getattr(criterion, "per_sentence_losses", None)
    if own is None:
        if type(criterion) not in _STOCK:
            raise TypeError(f"{type(criterion).__name__} has no per-sentence losses")
        return _STOCK[type(criterion)](criterion, model, sample)
    result = PerSentence(*own(model, sample))
    method = f"{type(criterion).__name__}.per_sentence_losses"
    n = sample.get("nsentences", len(result.losses) if result.losses.dim() else 0)
    if result.losses.dim() != 1 or len(result.losses) != n:
        raise ValueError(
            f"{method} returned losses of shape {tuple(result.losses.shape)}; needed is one loss a "
            f"sentence, shape (B,), B = {n} here"
        )
    if result.losses.element_size() < 4:
        raise ValueError(
            f"{method} returned losses in {result.losses.dtype}, too coarse for their differences; "
            "compute them in float32, from logits.float()"
        )
    return result


def require_replay(
    criterion: FairseqCriterion, first: Tensor, second: Tensor, dtype: torch.dtype
) -> None:
    """Two forwards of the same sentences from the same random state gave the same losses.

    Args:
        criterion: for its name.
        first, second: its per-sentence losses, shape (B,).
        dtype: that the model computes in.

    Raises:
        ValueError: naming the sentence that is furthest off, both losses, and what to suspect.
    """
    j = furthest_off(first, second, dtype)
    if j is not None:
        raise ValueError(
            f"two forwards of the same sentence from the same random state gave the losses "
            f"{first[j]:g} and {second[j]:g} (criterion {type(criterion).__name__}); delta-SAM "
            "compares such forwards. Dropout that torch.manual_seed does not replay is to be "
            "suspected (cuDNN's, between the layers of nn.LSTM and nn.GRU: set it to 0, in "
            "fairseq's lstm --encoder-dropout-out 0 --decoder-dropout-out 0, or set "
            "torch.backends.cudnn.enabled = False), then kernels that are not deterministic "
            "(torch.use_deterministic_algorithms finds them); or use SAM (--optimizer sam_*)"
        )


def require_same_sum(criterion: FairseqCriterion, losses: Tensor, stock: Tensor) -> None:
    """The per-sentence losses add up to what the criterion itself returns.

    Args:
        criterion: for its name.
        losses: its per-sentence losses, shape (B,).
        stock: its loss of the same sentences, under the same dropout masks. One in half precision
            may be off by the rounding of its terms and of their sum, ``2u`` each.

    Raises:
        ValueError: naming the criterion and both figures.
    """
    total, loss = losses.double().sum().item(), float(stock)
    size = max(losses.double().abs().sum().item(), 1.0)
    if math.isfinite(loss) and abs(total - loss) > size * max(
        _ADDED_UP, 4 * unit_roundoff(stock.dtype)
    ):
        raise ValueError(
            f"the per-sentence losses of criterion {type(criterion).__name__} add up to "
            f"{total:g}, but its loss is {loss:g}: it has terms that belong to no sentence; "
            "use SAM (--optimizer sam_*), or share them out in per_sentence_losses"
        )
