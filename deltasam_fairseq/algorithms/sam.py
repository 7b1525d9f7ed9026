"""Perturb lists of tensors by the ascent of SAM and ASAM.

Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization";
Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning".
"""

from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.rounding import StochasticRounding, at_least_float32

# Half-precision elements moved at a time: the intermediate float32 values are then small relative
# to the weights, and a GPU has few kernels to start.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 24}
_FOREACH = hasattr(torch, "_foreach_copy_") and tuple(
    int(part) for part in torch.__version__.split(".")[:2]
) >= (2, 4)


class Perturbation(NamedTuple):
    """The result of an ascent.

    Attributes:
        norm: ``||g||_2`` of SAM, ``||T g||_2`` of ASAM, 0-dim float64.
        realised: the share of ``eps*`` that survived rounding to the precision of the weights,
            ``(w' - w) . eps* / ||eps*||^2``, 0-dim float64; 1 without rounding.
    """

    norm: Tensor
    realised: Tensor


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm over all elements of some tensors.

    ``||t||_2 = sqrt(sum_i ||t_i||_2^2)``

    Args:
        tensors: any shapes, any floating dtype (half precision is accumulated in float32),
            on one device.

    Returns:
        0-dim float64 tensor on that device, without waiting for it; 0 for no tensors.
    """
    if isinstance(tensors, list) and _in_few_kernels(tensors):
        norms = list(torch._foreach_norm(tensors, 2, torch.float32))
    else:
        norms = [
            torch.linalg.vector_norm(t, dtype=torch.float32 if t.element_size() < 4 else None)
            for t in tensors
        ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(norms).double().square().sum().sqrt()


def _in_few_kernels(*lists: List[Tensor]) -> bool:
    """Whether torch's foreach kernels can and should take whole lists.

    They should on a GPU, where starting a kernel for each of some hundred tensors takes longer than
    the kernels do. In torch < 2.4 they cannot take norms of half precision in float32.
    """
    kinds = [{(t.device, t.dtype, t.layout) for t in tensors} for tensors in lists]
    if any(len(each) != 1 for each in kinds) or not _FOREACH:
        return False
    return all(
        device.type == "cuda" and dtype != torch.float64 and layout == torch.strided
        for ((device, dtype, layout),) in kinds
    )


def _move_lists_along_(
    out: List[Tensor], weights: List[Tensor], direction: List[Tensor], scale: Tensor
) -> None:
    """Do `move_along_` for lists of one device and dtype each, with float32 weights.

    Args:
        out: none of ``weights``; may be ``direction``.
        scale: 0-dim float32.
    """
    if out[0].dtype == direction[0].dtype == torch.float32:  # without further memory
        if out is not direction:
            torch._foreach_copy_(out, direction)
        torch._foreach_mul_(out, scale)
        torch._foreach_add_(out, weights)
        return
    for v, w, d in _groups(out, weights, direction):
        moved = list(torch._foreach_mul([t.float() for t in d], scale))
        torch._foreach_add_(moved, w)
        torch._foreach_copy_(v, moved)


def _groups(*lists: List[Tensor]) -> Iterator[Tuple[List[Tensor], ...]]:
    """Cut lists alike into groups of about `_PIECE` elements."""
    begin, filled = 0, 0
    for end, tensor in enumerate(lists[0], start=1):
        filled += tensor.numel()
        if filled >= _PIECE["cuda"] or end == len(lists[0]):
            yield tuple(tensors[begin:end] for tensors in lists)
            begin, filled = end, 0


def _radius_over_norm(rho: Union[float, Tensor], norm: Tensor) -> Tensor:
    """Return ``rho / norm``; 0 for norm 0 (no ascent direction), NaN if it is not finite.

    The NaN is on purpose: through the loss at the perturbed weights it reaches the training
    loop's handling of non-finite values without a device synchronisation.
    """
    scale = rho / norm
    scale = torch.where(norm > 0, scale, torch.zeros_like(scale))
    return torch.where(torch.isfinite(norm), scale, torch.full_like(scale, float("nan")))


def move_along_(
    out: Iterable[Tensor],
    weights: Iterable[Tensor],
    direction: Iterable[Tensor],
    scale: Tensor,
    rounding: Optional[StochasticRounding] = None,
) -> Tensor:
    """Write ``out_i = w_i + scale * d_i``, computed in at least float32, then rounded.

    Args:
        out: receives the result; each may be its ``weights`` or ``direction`` itself.
        weights: ``w``, at least as precise as ``out``.
        direction: ``d``, same shapes; may be a generator.
        scale: 0-dim tensor.
        rounding: default: to nearest.

    Returns:
        share of the movement that survived ``rounding``, see `Perturbation`.
    """
    if rounding is not None:
        return rounding.move_(out, weights, direction, scale)
    if isinstance(out, list) and isinstance(weights, list) and isinstance(direction, list):
        apart = all(v.data_ptr() != w.data_ptr() for v, w in zip(out, weights) if v.numel())
        if apart and _in_few_kernels(out, weights, direction) and weights[0].element_size() == 4:
            _move_lists_along_(out, weights, direction, scale.to(torch.float32))
            return torch.ones_like(scale, dtype=torch.float64)
    scales: Dict[Tuple[torch.device, torch.dtype], Tensor] = {}
    for tensors in zip(out, weights, direction):
        v, w, d = tensors
        alike = v.dtype == w.dtype == d.dtype and v.element_size() >= 4
        for v, w, d in [tensors] if alike else _pieces(*tensors):
            w = at_least_float32(w)
            kind = (w.device, w.dtype)
            if kind not in scales:
                scales[kind] = scale.to(*kind)
            # Older versions of torch do not convert an output of addcmul.
            moved = torch.addcmul(w, d.to(w.dtype), scales[kind], out=v if alike else None)
            if not alike:
                v.copy_(moved)
    return torch.ones_like(scale, dtype=torch.float64)


def _pieces(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Return tensors of one shape piece by piece, flat; whole if small or one is not contiguous."""
    size = _PIECE.get(tensors[0].device.type, _PIECE["cuda"])
    if tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        return iter([tensors])
    return zip(*(t.view(-1).split(size) for t in tensors))


def sam_ascent_(
    out: Iterable[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Union[float, Tensor],
    rounding: Optional[StochasticRounding] = None,
) -> Perturbation:
    """Write the weights at the SAM perturbation.

    ``out = w + eps*``,  ``eps* = rho g / ||g||_2``

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, not changed.
        grads: ascent gradient ``g``; its scale cancels. Under data parallelism reduced by the
            caller, so that every process computes the same ``eps*``.
        rho: radius of the ball in weight space, at least 0; a number or 0-dim tensor.
        rounding: see `move_along_`.

    Returns:
        a `Perturbation`. A zero gradient perturbs nothing; a gradient that is not finite makes all
        of ``out`` NaN.
    """
    norm = global_norm(grads)
    realised = move_along_(out, weights, grads, _radius_over_norm(rho, norm), rounding)
    return Perturbation(norm, realised)


def asam_ascent_(
    out: Iterable[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Union[float, Tensor],
    eta: float,
    rounding: Optional[StochasticRounding] = None,
) -> Perturbation:
    """Write the weights at the adaptive (elementwise, scale-invariant) SAM perturbation.

    ``out = w + rho T^2 g / ||T g||_2``,  ``T = diag(|w| + eta)``

    As in the paper, T covers all weights; the authors' code keeps T = 1 for parameters whose name
    does not contain "weight". With ``|w| + eta = 1`` everywhere this is `sam_ascent_`.

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, not changed.
        grads: ascent gradient, as in `sam_ascent_`.
        rho: radius in units of the weights' own size; the paper uses 0.5 to 2.
        eta: added to ``|w|`` so that weights at zero can move; the paper uses 0.01.
        rounding: see `move_along_`.

    Returns:
        a `Perturbation`; degenerate gradients as in `sam_ascent_`.
    """

    def t(w: Tensor) -> Tensor:
        return at_least_float32(w).abs() + eta

    norm = global_norm(t(w) * g for w, g in zip(weights, grads))
    direction = (t(w).square_() * g for w, g in zip(weights, grads))
    realised = move_along_(out, weights, direction, _radius_over_norm(rho, norm), rounding)
    return Perturbation(norm, realised)
