"""A backward that leaves the gradient at ``w + eps*`` in ``p.grad``, for any PyTorch loop.

    sam = SharpnessAware(model, method="delta_sam", rho=0.05, beta=3)
    losses = sam.backward(lambda: per_sentence_losses(model, batch))    # clean, shape (B,)
    optimizer.step(); optimizer.zero_grad(); scheduler.step()

It takes the place of ``loss.backward()``. Optimizer, scheduler, clipping and GradScaler stay as
they are, because the weights are w again when it returns.
"""

import functools
import inspect
import logging
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from deltasam_fairseq.algorithms import functional_loss, multiplied_in, multiplies_in_tf32
from deltasam_fairseq.core import (
    GSAM,
    Ascent,
    AscentFigures,
    DeltaWeighting,
    Descent,
    FisherMask,
    Functional,
    GibbsWeighting,
    Mask,
    Parts,
    Perturber,
    Radius,
    TrustRegion,
    TrustRegionTheta,
    Weighting,
)
from deltasam_fairseq.core.rng_replay import furthest_off
from deltasam_fairseq.pytorch.passes import Closure, ClosurePasses

logger = logging.getLogger(__name__)

# Of the adaptive methods; TRAM's T is |w|.
ETAS = {"asam": 0.01, "tram": 0.0, "tram_theta": 0.0}

_A_SENTENCE = "losses of at least one sentence; skip empty batches"


def _delta_sam(radius: Radius, beta: float = 3.0) -> Parts:
    _require(beta >= 0, "beta", beta, "a number of at least 0")
    return Parts(radius, DeltaWeighting(beta) if beta else Weighting())


def _rw_sam(radius: Radius, lambda_: float = 2.0) -> Parts:
    _require(lambda_ >= 0, "lambda_", lambda_, "a number of at least 0")
    return Parts(radius, GibbsWeighting(lambda_) if lambda_ else Weighting())


def _gsam(radius: Radius, alpha: float = 0.4) -> Parts:
    _require(alpha >= 0, "alpha", alpha, "a number of at least 0")
    return Parts(radius, descent=GSAM(alpha) if alpha else Descent())


def _fsam(radius: Radius, share: float = 0.1, every: int = 100) -> Parts:
    _require(0 < share <= 1, "share", share, "above 0, at most 1")
    _require(every >= 1, "every", every, "a number of at least 1")
    return Parts(radius, mask=FisherMask(share, every))


def _tram(radius: Radius, sigma: float = 1e-3) -> Parts:
    _require(sigma > 0, "sigma", sigma, "above 0")
    return Parts(TrustRegion(radius.rho, sigma))


# Method -> its parts, from the radius and the method's own hyperparameters.
METHODS: Dict[str, Callable[..., Parts]] = {
    "sam": Parts,
    "asam": Parts,
    "delta_sam": _delta_sam,
    "rw_sam": _rw_sam,
    "gsam": _gsam,
    "functional": lambda radius: Parts(radius, descent=Functional()),
    "fsam": _fsam,
    "tram": _tram,
    "tram_theta": lambda radius: Parts(TrustRegionTheta(radius.rho)),
}


class SharpnessAware:
    """Gradients at the perturbed weights, over one global batch a call of `backward`.

    Under data parallelism every process makes the same perturbation, from the batch of all; the
    ascent adds one reduction of the gradients, delta-SAM one of four float64 numbers, and one
    number counts the sentences. A call within the wrapper's ``no_sync`` averages its gradients too.

    Args:
        model: whose weights train, in its DistributedDataParallel wrapper if there is one. A loss
            with weights of its own belongs in it. Weights that require no gradient stay as they
            are.
        method: ``sam`` (Foret et al. 2020), ``asam`` (Kwon et al. 2021), ``delta_sam``, ``rw_sam``
            (Luo et al. 2025), ``gsam`` (Zhuang et al. 2022), ``functional`` (Singh et al.
            2025), ``fsam`` (Zhong et al. 2022), ``tram`` and ``tram_theta`` (Sherborne et al.
            2024), whose radius is how far noise, or the last update, moves the outputs; or the
            `Parts` of another, for which rho has no meaning.
        rho: radius of the perturbation, L2 norm in weight space, at least 0; 0: plain gradients.
            0.02 to 0.05 suits most fine-tuning, 0.5 to 2 ``asam``. Or a `Radius`, such as
            `deltasam_fairseq.core.RhoAlongLR`.
        more: the method's own: ``beta`` of ``delta_sam``, strength of the reweighting, at least 0,
            default 3, 0 is SAM; ``lambda_`` of ``rw_sam`` likewise, default 2; ``alpha`` of
            ``gsam``, at least 0, default 0.4; ``share`` of the weights that move and ``every`` so
            many updates renewed, of ``fsam``, default 0.1 and 100; ``sigma`` of ``tram``, standard
            deviation of its noise on the word embeddings, default 1e-3, which has no rho.
        eta: added to ``|w|`` by ``asam``, and makes another method adaptive; unit of a weight.
        probe_radius: of delta-SAM's probe; default: rho, and in half precision a radius that
            the weights resolve.
        reduction: what ``p.grad`` is the gradient of: the ``mean`` of the sentences of the global
            batch, or their ``sum``.
        seed: of probe and rounding, the same on every process.
        process_group: of a loop that averages gradients over processes without
            DistributedDataParallel.
        compute_dtype: in which the forward multiplies; default: found in the first update.

    Raises:
        ValueError: an argument out of range.
        TypeError: a model whose weights are in shards.
    """

    def __init__(
        self,
        model: Module,
        method: Union[str, Parts] = "delta_sam",
        rho: Union[float, Radius] = 0.05,
        *,
        eta: Optional[float] = None,
        probe_radius: Optional[float] = None,
        reduction: str = "mean",
        seed: int = 0,
        process_group: Any = None,
        compute_dtype: Optional[torch.dtype] = None,
        **more: float,
    ) -> None:
        radius = rho if isinstance(rho, Radius) else Radius(rho)
        for name, value in (("rho", radius.rho), ("eta", eta or 0.0)):
            _require(value >= 0, name, value, "a number of at least 0")
        _require(probe_radius is None or probe_radius > 0, "probe_radius", probe_radius, "above 0")
        _require(reduction in ("mean", "sum"), "reduction", reduction, ["mean", "sum"])
        if any(hasattr(p, "device_mesh") for p in model.parameters()) or any(
            type(m).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine")
            for m in model.modules()
        ):
            raise TypeError(
                f"{type(model).__name__}: its weights are in shards, whose norm no process knows; "
                "use DistributedDataParallel"
            )
        if eta is None and isinstance(method, str):
            eta = ETAS.get(method)
        parts = method if isinstance(method, Parts) else _parts(method, radius, more)
        self.model, self.reduction, self.seed = model, reduction, seed
        self.update = 0
        self._perturber = Perturber(parts, eta, probe_radius)
        self._ascent = Ascent(self._perturber, self.parameters)
        self._group = getattr(model, "process_group", process_group)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self._group is None:
            logger.warning(
                "SharpnessAware: the model is not in DistributedDataParallel, so every process "
                "makes a perturbation of its own; pass the wrapped model, or process_group"
            )
        self._compute_dtype = compute_dtype
        self._divisor = 0.0  # of the ascent's sum of losses: the first batch's sentences
        self._looked = False
        self._last: Optional[_Update] = None
        _require(
            bool(self.parameters()), "model", type(model).__name__, "one with weights to train"
        )
        self._compute_in([(p.dtype, p.requires_grad) for p in self._floating(model)])

    def parameters(self) -> List[Parameter]:
        """Return the weights that train, in the model's order."""
        return list(self._named())

    def _named(self) -> Dict[Parameter, str]:
        """Return `parameters` and their names, with and without the wrapper the same."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        model: Any = self.model.module if wrapped else self.model
        return {p: name for name, p in model.named_parameters() if p.requires_grad}

    def backward(
        self,
        closures: Union[Closure, Sequence[Closure]],
        scaler: Any = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Add the descent's gradient to ``p.grad``, as ``backward`` of a loss does.

        Args:
            closures: each computes the losses of the sentences of a micro-batch, shape (B,), in
                float32 or better, under an autocast of its own if there is one; ``functional``,
                ``tram`` and ``tram_theta`` ask for these and the logits, shape (B, C) or (..., C).
                Several are one global batch, as are those of all processes, as many on each. Each
                is called two to four times, with the same random numbers.
            scaler: a ``GradScaler``; the gradients are then scaled for it.
            scale: of the gradients, beside; for a loop that divides by a number of its own.

        Returns:
            the losses at w of this process's sentences, without graph, shape (N,).

        Raises:
            ValueError: a closure's losses are not one a sentence, not the same in two calls, or
                of no sentence.
        """
        closures = [closures] if callable(closures) else list(closures)
        _require(bool(closures), "closures", closures, "at least one")
        parts, draw = self._perturber.parts, (self.seed, self.update)
        self._perturber.trained = trained = self._named()
        params = list(trained)
        parts.radius.before_backward(trained)
        scale_loss = _unscaled if scaler is None else scaler.scale
        passes_with = functools.partial(
            ClosurePasses, closures, self.model, params, self._group, scale_loss, parts, draw
        )
        if not self._looked:
            self._look_at_first(passes_with())
        passes = passes_with(divisor=self._divisor)
        accumulated = [(p, p.grad) for p in params]
        if getattr(self.model, "gradient_as_bucket_view", False):  # the next reduction overwrites
            accumulated = [(p, g if g is None else g.clone()) for p, g in accumulated]
        try:
            _forget_gradients(params)
            figures = None
            if parts.radius.active(self.update):
                figures = self._ascent.run(passes, *draw)
                _forget_gradients(params)
            perturbed = self._descend(passes, figures, scale)
        except BaseException:
            _forget_gradients(params)
            raise
        finally:
            self._restore()
            for p, before in accumulated:
                if before is not None:
                    p.grad = before if p.grad is None else p.grad.add_(before)
        clean = torch.cat([passes.clean[i] for i in range(passes.count)])
        self._last = _Update(clean, torch.cat(perturbed), figures, passes.n)
        self.update += 1
        return clean

    def _descend(
        self, passes: ClosurePasses, figures: Optional[AscentFigures], scale: float
    ) -> List[Tensor]:
        """Forward and backward where the weights are; the gradient is in ``p.grad``.

        Returns:
            the losses there, without graph, one tensor a micro-batch.
        """
        descent, perturbed = self._perturber.parts.descent, []
        factor = None if figures is None else self._factor(passes, figures, scale)
        passes.replay()
        for i in range(passes.count):
            with passes.without_sync(i < passes.count - 1):
                found = passes.forward(i)
                perturbed.append(found.losses.detach())
                if figures is None:
                    passes.log(i, found)
                    if i == passes.count - 1:  # now the number of all sentences is known
                        factor = self._factor(passes, figures, scale)
                        unscaled = [p.grad for p in self.parameters() if p.grad is not None]
                        _multiply(unscaled, factor * self._divisor)
                loss = descent.loss(i, found.losses)
                if figures is not None and found.outputs is not None and i in passes.deltas:
                    loss = functional_loss(loss, [found.outputs], [passes.deltas[i]])
                passes.backward(loss, 1 / self._divisor if factor is None else factor)
        # DistributedDataParallel has averaged them, but not within its no_sync().
        if not getattr(self.model, "require_backward_grad_sync", not descent.corrects):
            passes.average_grads()
        if descent.corrects and figures is not None and factor is not None:
            # The ascent's gradient is in the units of its own factor.
            by_weight = {p: p.grad for p in self.parameters() if p.grad is not None}
            _multiply(by_weight.values(), 1 / (self._divisor * factor))
            descent.correct_(by_weight)
            _multiply(by_weight.values(), self._divisor * factor)
        return perturbed

    def _factor(
        self, passes: ClosurePasses, figures: Optional[AscentFigures], scale: float
    ) -> Union[float, Tensor]:
        """Return what the sum of a process's losses is multiplied by.

        Data-parallel wrappers average gradients over processes.
        """
        passes.count_sentences(None if figures is None else figures.reweighting)
        if not torch.is_tensor(passes.n):
            _require(passes.n > 0, "closures", "without sentences", _A_SENTENCE)
        return scale * passes.world / (passes.n if self.reduction == "mean" else 1)

    def _look_at_first(self, passes: ClosurePasses) -> None:
        """Find the precision of the forward, and require that forwards replay; once.

        Raises:
            ValueError: the same sentences have other losses in a second call, or processes have
                different numbers of micro-batches.
        """
        passes.require_same_count()
        found: List[Tuple[torch.dtype, bool]] = []

        def note(module: Module, _: Any) -> None:
            own = self._floating(module, recurse=False)
            found.extend((multiplied_in(p), p.requires_grad) for p in own)

        hooks = [m.register_forward_pre_hook(note) for m in self.model.modules()]
        try:
            with torch.no_grad():
                passes.replay()
                first = passes.forward(0).losses
                passes.replay()
                second = passes.forward(0).losses
            passes.replay()
        finally:
            for hook in hooks:
                hook.remove()
        if any(trained for _, trained in found):
            self._compute_in(found)
        j = furthest_off(first, second, self._perturber.probe_dtype or first.dtype)
        if j is not None:
            raise ValueError(
                f"two calls of a closure from the same random state gave sentence {j} the losses "
                f"{first[j]:g} and {second[j]:g}; the weights of the sentences and the step "
                "compare such calls. The closure must compute the same batch in every call (fetch "
                "it outside), with random numbers of torch's, numpy's and Python's own generators; "
                "then dropout of cuDNN's nn.LSTM and kernels that are not deterministic are to be "
                "suspected"
            )
        if not self._divisor:
            divisor = float(passes.sum_over_processes(len(first) * passes.count))
            _require(divisor > 0, "first micro-batch", "without sentences", _A_SENTENCE)
            self._divisor = divisor
        self._looked = True

    @staticmethod
    def _floating(module: Module, recurse: bool = True) -> List[Parameter]:
        return [p for p in module.parameters(recurse) if p.is_floating_point()]

    def _compute_in(self, found: Sequence[Tuple[torch.dtype, bool]]) -> None:
        """Take the coarsest precision, of trained weights to round, of all to probe.

        Args:
            found: in what weights are multiplied, and whether they train; at least one does.
        """
        coarsest = min((dtype for dtype, _ in found), key=_bits)
        of_trained = min((dtype for dtype, trained in found if trained), key=_bits)
        tf32 = multiplies_in_tf32(self.parameters()[0].device)
        own = self._compute_dtype
        self._perturber.compute_in(own or of_trained, tf32=tf32, probe=own or coarsest)

    # For loops that were written for another SAM

    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights to ``w + eps*`` along the gradients in ``p.grad``.

        With `second_step` the two-step interface of other implementations, for ``sam`` and
        ``asam`` on one full batch: the second forward draws its own dropout masks, and gradients
        that a GradScaler scaled must be unscaled before.

        Raises:
            ValueError: for another method.
        """
        parts = self._perturber.parts
        own = type(parts.weighting), type(parts.mask), type(parts.descent)
        simple = own == (Weighting, Mask, Descent) and not parts.radius.needs_outputs
        _require(simple, "method", "of first_step", "sam, asam")
        self._restore()
        self._perturber.rho = parts.radius.in_force(self.update, None)
        self._perturber.ascend(self.parameters(), self.seed, self.update)
        self.update += 1
        if zero_grad:
            _forget_gradients(self.parameters())

    def second_step(self, optimizer: Any = None, zero_grad: bool = False) -> None:
        """Restore the weights; let ``optimizer`` step from them, if given.

        Raises:
            ValueError: ``zero_grad`` without an optimizer, which would lose the gradients.
        """
        self._restore()
        given = optimizer is not None or not zero_grad
        remedy = "with an optimizer, which steps before: second_step(optimizer, zero_grad=True)"
        _require(given, "zero_grad", zero_grad, remedy)
        if optimizer is not None:
            optimizer.step()
        if zero_grad:
            _forget_gradients(self.parameters())

    def _restore(self) -> None:
        self._perturber.restore()
        torch.clear_autocast_cache()  # of casts of other weights

    # Figures and resuming

    def figures(self) -> Dict[str, float]:
        """Return what the last `backward` found, for a log; waits for the device.

        ``loss``, ``sam_loss`` (at ``w + eps*``) and ``sharpness``, their difference: means over
        this process's sentences. Of the global batch: ``ascent_gnorm``, ``delta_sam_r``,
        ``delta_sam_uniform`` (1 for uniform weights in a degenerate case). Of this process's
        sentences: ``delta_sam_effective``, the effective share of instances, 1/N to 1, and
        ``delta_sam_negative``, the share with a negative weight. In half precision:
        ``sam_realised``, the share of the ascent that survived rounding, and
        ``delta_sam_radius``, of the probe. Where they vary: ``sam_rho``; ``sam_mask_share``.
        """
        if self._last is None:
            return {}
        clean, perturbed, found, n = self._last
        figures: Dict[str, Any] = {"loss": clean.mean()}
        if found is not None:
            figures["sam_loss"] = perturbed.mean()
            figures["sharpness"] = (perturbed.double() - clean.double()).mean()
            figures["ascent_gnorm"] = found.gnorm / n
            figures["sam_realised"] = found.realised
            figures["sam_rho"], figures["sam_mask_share"] = found.rho, found.mask_share
        if found is not None and found.reweighting is not None:
            r = found.reweighting
            figures["delta_sam_r"] = r.r
            figures["delta_sam_effective"] = len(r.weights) / (r.n * r.n * r.squares)
            figures["delta_sam_negative"] = (r.weights < 0).double().mean()
            figures["delta_sam_uniform"] = r.uniform
            if found.realised is not None:
                figures["delta_sam_radius"] = found.probe_radius
        return {name: float(value) for name, value in figures.items() if value is not None}

    def state_dict(self) -> Dict[str, Any]:
        """Return what an exact continuation needs beside model, optimizer and generators."""
        own = {"update": self.update, "seed": self.seed, "divisor": self._divisor}
        parts = self._perturber.parts
        return {**own, "mask": parts.mask.state_dict(), "radius": parts.radius.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is none.
        """
        missing = [key for key in self.state_dict() if key not in state and key != "radius"]
        _require(not missing, "state", f"without {missing}", "what state_dict() returned")
        self.update, self.seed, self._divisor = state["update"], state["seed"], state["divisor"]
        self._perturber.parts.mask.load_state_dict(state["mask"])
        self._perturber.parts.radius.load_state_dict(state.get("radius", {}))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _unscaled(loss: Tensor) -> Tensor:
    return loss


class _Update(NamedTuple):
    """What `SharpnessAware.figures` are made of: losses of this process, N of the batch."""

    clean: Tensor
    perturbed: Tensor
    figures: Optional[AscentFigures]
    n: Union[float, Tensor]


def _forget_gradients(params: Sequence[Parameter]) -> None:
    for p in params:
        p.grad = None


def _multiply(grads: Iterable[Tensor], factor: Union[float, Tensor]) -> None:
    for grad in grads if torch.is_tensor(factor) or factor != 1 else ():
        grad.mul_(factor)


def _parts(method: str, radius: Radius, more: Dict[str, float]) -> Parts:
    _require(method in METHODS, "method", method, list(METHODS))
    build = METHODS[method]
    own = list(inspect.signature(build).parameters)[1:] if build is not Parts else []
    for name, value in more.items():
        _require(name in own, name, value, f"with method {method!r} only {own}")
    return build(radius, **more)


def _require(condition: bool, name: str, value: Any, allowed: Any) -> None:
    if not condition:
        raise ValueError(f"SharpnessAware: {name} {value!r}; allowed: {allowed}")
