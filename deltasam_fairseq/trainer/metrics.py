"""Log the figures of a sharpness-aware update."""

from typing import Any, Container, Dict, List, Optional, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor

from deltasam_fairseq.core import AscentFigures, DeltaWeighting, Mask, Parts
from deltasam_fairseq.criterions import OutputsAtW

Logs = List[Dict[str, Any]]

# Keys in fairseq's logging outputs, so that fairseq's own reduction over ranks includes them: the
# loss of a micro-batch at w + eps*, and a rank's terms of sums over all sentences.
_PREFIX = "sam:"
_LOSS = _PREFIX + "loss"
_RANKS = _PREFIX + "ranks"
_GNORM = _PREFIX + "gnorm"
_ASCENT_SIZE = _PREFIX + "ascent_size"
_SIZE = _PREFIX + "sample_size"
_SENTENCES = _PREFIX + "sentences"
_NEGATIVE = _PREFIX + "negative"
_SQUARES = _PREFIX + "squares"
_DRAWN = _PREFIX + "drawn"
_DRAWN_SQUARED = _PREFIX + "drawn_squared"

# Variance over ranks of `direction_sum`: 1 for different numbers, 1e-14 if processors round
# differently. One rank of a thousand that differs by 5e-5 is detected.
_SAME = 1e-12


# Figures that are averages over the updates with an ascent.
_AVERAGES = (
    *("sam_loss", "sharpness", "ascent_gnorm", "sam_rho", "sam_mask_share"),
    *("sam_realised", "delta_sam_radius"),
    *("delta_sam_effective", "delta_sam_r", "delta_sam_negative"),
)


class StepMetrics:
    """Collect the ascent's figures until fairseq logs the update.

    fairseq's meters get the clean forward's logging outputs, so that loss and accuracy mean the
    same with and without SAM. This class adds

    ==================== ==================================================================
    sam_loss             loss at ``w + eps*``, in the units of loss
    sharpness            sam_loss - loss
    sam_mask_share       share of the weights that the ascent moves (--sam-mask)
    sam_rho              radius in force, where updates have different ones
    sam_realised         share of the ascent that survived rounding (half precision only)
    ascent_gnorm         norm of the ascent gradient, normalised as fairseq's gnorm
    delta_sam_effective  effective share of instances, ``1 / (N sum_j g_j^2)``, 1/N to 1; of
                         RW-SAM with p for g
    delta_sam_r          the ratio r of Eq. 5 (not of RW-SAM)
    delta_sam_negative   share of sentences with a negative ascent weight, 0 to 1 (likewise)
    delta_sam_uniform    number of updates with uniform weights (degenerate cases)
    delta_sam_radius     radius of the probe (half precision only)
    ==================== ==================================================================

    Args:
        per_rank: every rank has its own ascent; the log then has the mean of ascent_gnorm over
            ranks, and rank 0's delta_sam_r.
        estimated: the clean forwards have part of the sentences. They log an estimate for all;
            sharpness is dropped, since it would compare different sentences.
        sums: whether logging outputs hold sums over sentences; an estimate is then scaled up to
            the sums over all.

    Attributes:
        figures: of the ascent, once it is complete.
        drawn: `direction_sum` of this rank, if ranks compare it.
        outputs: of the model at w, where the method needs them.
    """

    figures: AscentFigures

    def __init__(self, per_rank: bool, estimated: bool = False, sums: bool = True) -> None:
        self.per_rank = per_rank
        self.estimated = estimated
        self.sums = sums
        self.drawn: Optional[Tensor] = None
        self.outputs: Optional[OutputsAtW] = None
        self._clean: Logs = []
        self._sample_sizes: List[Any] = []
        self._shares: List[float] = []
        self._dummies: List[bool] = []

    def add(
        self,
        logging_output: Dict[str, Any],
        sample_size: Any,
        is_dummy: bool,
        share: float = 1.0,
    ) -> None:
        """Add a micro-batch's clean forward.

        Args:
            logging_output, sample_size: what the criterion returned.
            is_dummy: whether this is fairseq's dummy for a rank without this micro-batch.
            share: of its sentences in the forward, above 0, at most 1.
        """
        scale = share if self.sums else 1.0
        self._clean.append({k: _over(v, scale) for k, v in logging_output.items()})
        self._sample_sizes.append(sample_size)
        self._shares.append(share)
        self._dummies.append(is_dummy)

    def only_dummies(self) -> bool:
        """Whether this rank had no sentence in this update."""
        return all(self._dummies)

    def sample_size(self, perturbed: Logs, counted: Any) -> Any:
        """Return this rank's term of the denominator of the descent's gradient.

        Args:
            perturbed: logging outputs of the descent's forward, one a micro-batch.
            counted: fairseq's own count, wrong if the last micro-batch is a dummy.
        """
        if not self.estimated:
            return self._forwarded()
        if not self._dummies[-1] or len(perturbed) != len(self._dummies):
            return counted
        found = zip(perturbed, self._sample_sizes, self._shares, self._dummies)
        return float(
            sum(log.get("sample_size", s / share) for log, s, share, dummy in found if not dummy)
        )

    def _forwarded(self) -> Any:
        """Return the sample size of this rank's clean forwards."""
        total = sum(s * (not dummy) for s, dummy in zip(self._sample_sizes, self._dummies))
        return total.float() if torch.is_tensor(total) else float(total)

    def merge(self, perturbed: Logs) -> Logs:
        """Return the clean logging outputs, with all other figures to reduce over ranks.

        Args:
            perturbed: logging outputs of the descent's forward, one a micro-batch.
        """
        if len(perturbed) != len(self._clean):  # a micro-batch ran out of memory
            perturbed = [{} for _ in self._clean]
        merged = [
            {**c, **self._of_descent(p)}
            for c, p, dummy in zip(self._clean, perturbed, self._dummies)
            if not dummy or self.only_dummies()
        ]
        if not merged:
            return merged
        merged[0].update({_RANKS: 1.0, _GNORM: self.figures.gnorm})
        if self.drawn is not None:
            merged[0].update({_DRAWN: self.drawn, _DRAWN_SQUARED: self.drawn**2})
        if self.estimated:
            merged[0][_ASCENT_SIZE] = self._forwarded()
        reweighting = self.figures.reweighting
        if reweighting is not None:
            weights, n = reweighting.weights, reweighting.n
            merged[0][_SENTENCES] = float(len(weights))
            merged[0][_NEGATIVE] = (weights < 0).sum().double()
            merged[0][_SQUARES] = n * n * reweighting.squares
        return merged

    def require_same_draws(self, reduced: Logs) -> None:
        """Compare the ranks' random numbers in the first update; waits for the device.

        Args:
            reduced: from `merge`, summed over all ranks or gathered.

        Raises:
            ValueError: the numbers differ; on every rank.
        """
        if self.drawn is None:
            return
        keys = (_RANKS, _DRAWN, _DRAWN_SQUARED)
        ranks, drawn, squared = (sum(float(log.get(k, 0.0)) for log in reduced) for k in keys)
        if squared / ranks - (drawn / ranks) ** 2 > _SAME:
            raise ValueError(
                "the ranks draw different random numbers from one --seed, so each would perturb "
                "the weights in its own way: a GPU's numbers depend on its model. Use GPUs of "
                "one model, or --sam-scope rank, where every rank has a perturbation of its own"
            )

    def _of_descent(self, perturbed: Dict[str, Any]) -> Dict[str, Any]:
        if "loss" not in perturbed:
            return {}
        if not self.estimated or "sample_size" not in perturbed:
            return {_LOSS: perturbed["loss"]}
        return {_LOSS: perturbed["loss"], _SIZE: perturbed["sample_size"]}

    @staticmethod
    def split(merged: Logs) -> Tuple[Logs, Logs, Dict[str, Any]]:
        """Undo `merge`, after the reduction.

        Returns:
            clean logging outputs; the same with the loss at ``w + eps*``; sums over all ranks.
        """
        clean = [{k: v for k, v in log.items() if not k.startswith(_PREFIX)} for log in merged]
        perturbed = [{**c, "loss": log[_LOSS]} for c, log in zip(clean, merged) if _LOSS in log]
        for of_descent, log in zip(perturbed, (log for log in merged if _LOSS in log)):
            if _SIZE in log:
                of_descent["sample_size"] = log[_SIZE]
        keys = (_RANKS, _GNORM, _ASCENT_SIZE, _SENTENCES, _NEGATIVE, _SQUARES)
        sums = {k: sum(log[k] for log in merged if k in log) for k in keys}
        return clean, perturbed, sums

    def report(
        self,
        task: Any,
        criterion: Any,
        clean: Logs,
        perturbed: Logs,
        sums: Dict[str, Any],
        sample_size: Any,
    ) -> None:
        """Log the figures to fairseq's active meters.

        Args:
            task, criterion: reduce logging outputs to a loss.
            clean, perturbed, sums: from `split`.
            sample_size: of the global batch; the weight of this update in averages.
        """
        loss, sam_loss = (_logged_loss(task, criterion, logs) for logs in (clean, perturbed))
        if loss is not None and sam_loss is not None:
            metrics.log_scalar("sam_loss", sam_loss, sample_size, priority=20, round=3)
            if not self.estimated:
                metrics.log_scalar("sharpness", sam_loss - loss, sample_size, priority=21, round=6)
        # A rank's own shard has fewer sentences by the number of ranks.
        gnorm = sums[_GNORM] if self.per_rank else sums[_GNORM] / sums[_RANKS]
        size = sums[_ASCENT_SIZE] if self.estimated else sample_size
        metrics.log_scalar("ascent_gnorm", gnorm / (size or 1.0), priority=401, round=3)
        found, reweighting = self.figures, self.figures.reweighting
        if found.mask_share is not None:
            metrics.log_scalar("sam_mask_share", found.mask_share, priority=21, round=4)
        if found.rho is not None:
            metrics.log_scalar("sam_rho", found.rho, priority=21, round=6)
        if found.realised is not None:
            metrics.log_scalar("sam_realised", found.realised, priority=21, round=3)
        if reweighting is None:
            return
        if found.realised is not None and found.probe_radius is not None:
            metrics.log_scalar("delta_sam_radius", found.probe_radius, priority=25, round=3)
        n = sums[_SENTENCES]
        metrics.log_scalar("delta_sam_effective", n / sums[_SQUARES], priority=22, round=3)
        if reweighting.r is not None:
            metrics.log_scalar("delta_sam_r", reweighting.r, priority=23, round=3)
            metrics.log_scalar("delta_sam_negative", sums[_NEGATIVE] / n, priority=24, round=3)
        uniform = reweighting.uniform.double()
        metrics.log_scalar_sum("delta_sam_uniform", uniform, priority=25, round=0)

    def finite(self) -> Optional[Tensor]:
        """Whether the guardedness of all sentences is finite, 0-dim; None for SAM."""
        reweighting = self.figures.reweighting
        return None if reweighting is None else reweighting.finite


def on_host(figures: Any) -> Any:
    """Return nests of lists and dicts with their 0-dim tensors on the host.

    One copy brings all, so that the host waits for the device once. Dtypes stay.
    """
    found: List[Tensor] = []

    def collect(node: Any) -> None:
        if isinstance(node, (list, tuple, dict)):
            for inner in node.values() if isinstance(node, dict) else node:
                collect(inner)
        elif _is_on_device(node):
            found.append(node)

    collect(figures)
    if not found:
        return figures
    copied = iter(torch.stack([t.detach().double() for t in found]).cpu().unbind())

    def brought(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: brought(inner) for key, inner in node.items()}
        if isinstance(node, (list, tuple)):
            return [brought(inner) for inner in node]
        return next(copied).to(node.dtype) if _is_on_device(node) else node

    return brought(figures)


def _is_on_device(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() == 0 and value.device.type != "cpu"


def without_ascent() -> None:
    """Remove empty meters of the ascent from fairseq's active ones.

    An update without an ascent adds nothing to them. If fairseq has reset its meters since the
    last ascent (--log-interval), it would log them without a value.
    """
    for meters in metrics.get_active_aggregators():
        for key in _AVERAGES:
            meter = meters.get(key)
            if meter is not None and not torch.is_tensor(meter.count) and not meter.count:
                del meters[key]
                meters.priorities = [entry for entry in meters.priorities if entry[-1] != key]


def keys_without(parts: Parts) -> List[str]:
    """Return the keys that only other methods' updates log."""
    logged = {
        "sam_rho": parts.radius.varies,
        "sam_mask_share": type(parts.mask) is not Mask,
        "delta_sam_r": isinstance(parts.weighting, DeltaWeighting),
        "delta_sam_negative": isinstance(parts.weighting, DeltaWeighting),
    }
    return [key for key, there in logged.items() if not there]


def drop_meters_of_ascent(sam: bool, delta_sam: bool, unused: Container[str] = ()) -> None:
    """Drop loaded meters that this run never updates; fairseq would log them as null.

    Args:
        sam: whether the run has ascents.
        delta_sam: whether they are delta-SAM's.
        unused: keys that the run's method does not have.
    """
    for aggregator in metrics._aggregators.values():
        for key in list(aggregator):
            of_delta_sam = key.startswith("delta_sam_")
            of_sam = key.startswith("sam_") or key in _AVERAGES
            if (of_delta_sam and not delta_sam) or (of_sam and not sam) or key in unused:
                del aggregator[key]
                aggregator.priorities = [e for e in aggregator.priorities if e[-1] != key]


def _over(value: Any, share: float) -> Any:
    """Scale a sum over a share of the sentences up to all of them."""
    number = torch.is_tensor(value) or isinstance(value, (int, float))
    if share == 1 or isinstance(value, bool) or not number:
        return value
    return value / share


def _logged_loss(task: Any, criterion: Any, logs: Logs) -> Optional[Any]:
    """Return the loss that the task would log for these logging outputs, unrounded."""
    if not logs:
        return None
    with metrics.aggregate(new_root=True) as agg:
        task.reduce_metrics(logs, criterion)
    return agg["loss"].avg if "loss" in agg else None
