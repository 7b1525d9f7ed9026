"""Output gradients of a criterion whose loss is a function of the model's output alone.

Such a criterion says so by an attribute of its class, ``loss_of_output = True``; of fairseq's own
those in the table below are such. Its forward sees a stand-in for the model that keeps the logits,
and in a descent along fixed output gradients (functional SAM) its loss gets another graph. The
model, the data-parallel wrappers and the rest of fairseq's step are as always.
"""

import contextlib
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.criterions.sentence_ranking import SentenceRankingCriterion
from torch import Tensor

from deltasam_fairseq.algorithms import at_least_float32, functional_loss, trust_region_sums
from deltasam_fairseq.criterions.base import RegularisedCriterion
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.per_sentence import PerSentence, detached, per_sentence_losses
from deltasam_fairseq.fairseq_patches.patching import replaced

# Exact types: a subclass may have another loss.
_STOCK = (
    SentencePredictionCriterion,
    SentenceRankingCriterion,
    MaskedLmLoss,
    CrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterion,
)


def has_loss_of_output(criterion_class: type) -> bool:
    """Whether the loss of such criterions depends on the weights through the logits alone."""
    return criterion_class in _STOCK or getattr(criterion_class, "loss_of_output", False)


class LogitsModel:
    """Stands for the model in a criterion's forward and keeps its logits, at least in float32.

    Args:
        model: in whatever data-parallel wrapper; its output, or the first entry of it, are logits.
        cut: whether the criterion gets them without their graph.

    Attributes:
        logits: of each call, with graph; shapes as the model's.
    """

    def __init__(self, model: torch.nn.Module, cut: bool) -> None:
        self._model = model
        self._cut = cut
        self.logits: List[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        logits = at_least_float32(output if torch.is_tensor(output) else output[0])
        self.logits.append(logits)
        if not torch.is_tensor(output):
            rest = (logits, *output[1:])
            output = type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
        else:
            output = logits
        return detached(output) if self._cut else output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class OutputsAtW:
    """Logits z of every micro-batch at w, or ``dL/dz`` and a descent along it.

    Args:
        criterion: with a loss of the output, without its data-parallel wrapper.
        gradients: whether to keep ``dL/dz``.
        logits: whether to keep z.

    Each costs one float32 tensor of the size of the logits a micro-batch, for the update.
    """

    def __init__(self, criterion: FairseqCriterion, gradients: bool, logits: bool) -> None:
        self._criterion = criterion
        self.gradients = gradients
        self._keeps_logits = logits
        self._deltas: Dict[int, List[Tensor]] = {}
        self._logits: Dict[int, List[Tensor]] = {}

    @contextlib.contextmanager
    def found_in(self, i: int) -> Iterator[None]:
        """Within, the criterion's forward of micro-batch ``i`` at w also finds them."""
        own = self._criterion.forward

        def forward(model: Any, sample: Any, reduce: bool = True) -> Tuple[Tensor, Any, Any]:
            at_w = LogitsModel(model, cut=False)
            loss, *rest = own(at_w, sample, reduce)
            self._find(i, loss, at_w)
            return (loss, *rest)

        with replaced(self._criterion, "forward", forward):
            yield

    def per_sentence_losses(self, i: int, model: Any, sample: Dict[str, Any]) -> PerSentence:
        """Return `deltasam_fairseq.criterions.per_sentence_losses`; also find them."""
        at_w = LogitsModel(model, cut=False)
        found = per_sentence_losses(self._criterion, at_w, sample)  # type: ignore[arg-type]
        self._find(i, found.losses, at_w)
        return found

    def _find(self, i: int, losses: Tensor, at_w: LogitsModel) -> None:
        if self.gradients:
            self._deltas[i] = list(
                torch.autograd.grad(losses.sum(), at_w.logits, retain_graph=True)
            )
        if self._keeps_logits:
            self._logits[i] = [z.detach() for z in at_w.logits]

    @torch.no_grad()
    def divergence(
        self, i: int, model: Any, sample: Dict[str, Any], sigma: Optional[float]
    ) -> Tensor:
        """Return the sum of the divergences of the outputs from those at w, and their number.

        ``sum KL(p(. | x + z) || p(. | x; w))``, z normal on the word embeddings of all tokens but
        padding; of numbers the squared difference.

        Args:
            model: without wrappers, at its own weights or others.
            sample: micro-batch ``i``.
            sigma: standard deviation of z; None for no noise.

        Returns:
            shape (2,), float64; see `trust_region_sums`.
        """
        moved, clean = LogitsModel(model, cut=True), self._logits[i]
        net_inputs = [v for k, v in sample.items() if k.startswith("net_input")]
        with contextlib.ExitStack() as noise:
            for inputs in () if sigma is None else net_inputs:
                batch = Batch(model, {"net_input": inputs}, None, {})  # type: ignore[arg-type]
                delta = batch.noise("normal", sigma or 0.0)
                noise.enter_context(batch.embeddings.perturbed(batch.tokens, delta))
            self._criterion.forward(moved, sample)
        if isinstance(self._criterion, RegularisedCriterion):
            return self._objective_divergence(model, sample, moved.logits[0], clean[0])
        after, before = (
            z[0] if len(z) == 1 else torch.cat(z, dim=1) for z in (moved.logits, clean)
        )
        target, counted = sample.get("target"), None
        if target is not None and after.dim() == 3 and target.shape == after.shape[:-1]:
            counted = target.ne(self._criterion.padding_idx)
        regression = bool(getattr(self._criterion, "regression_target", False))
        return trust_region_sums(after, before, counted, regression)

    def _objective_divergence(
        self, model: Any, sample: Dict[str, Any], moved: Tensor, clean: Tensor
    ) -> Tensor:
        """Likewise for this package's criterions, by what their tasks have."""
        objective = self._criterion.batch(model, sample, 1.0).objective  # type: ignore[attr-defined]
        found = objective.directed_divergence(objective.scores(moved), objective.scores(clean))
        padding = getattr(objective, "padding", None)
        n = torch.ones_like(found).sum() if padding is None else (~padding).sum()
        return torch.stack([found.double().sum(), n.double()])

    @contextlib.contextmanager
    def descent(self) -> Iterator[None]:
        """Within, the loss of micro-batch 0, 1, ... has the gradient ``J_z^T dL/dz(w)``.

        Raises:
            ValueError: in the forward, if the loss depends on weights beside the logits.
        """
        calls, own = 0, self._criterion.forward

        def forward(model: Any, sample: Any, reduce: bool = True) -> Tuple[Tensor, Any, Any]:
            nonlocal calls
            deltas = self._deltas[calls % len(self._deltas)]  # fairseq's NanDetector goes round
            calls += 1
            moved = LogitsModel(model, cut=True)
            loss, *rest = own(moved, sample, reduce)
            if loss.requires_grad:
                raise ValueError(
                    f"--sam-functional: the loss of {type(self._criterion).__name__} depends on "
                    "weights beside the model's logits (--adaptive-softmax-cutoff, or weights of "
                    "the criterion); train without them or drop --sam-functional"
                )
            return (functional_loss(loss, moved.logits, deltas), *rest)

        with replaced(self._criterion, "forward", forward):
            yield
