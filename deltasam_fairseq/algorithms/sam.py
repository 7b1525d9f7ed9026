"""The ascent of SAM and ASAM over lists of tensors.

Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization";
Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning".
"""

from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.rounding import StochasticRounding, at_least_float32

# Elements of half precision that are moved at a time: the float32 values in between are then
# small beside the weights, and a GPU has few operations to start.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 24}
_FOREACH = hasattr(torch, "_foreach_copy_") and tuple(
    int(part) for part in torch.__version__.split(".")[:2]
) >= (2, 4)


class Perturbation(NamedTuple):
    """What an ascent found.

    Attributes:
        norm: ``||g||_2`` of SAM, ``||T g||_2`` of ASAM, 0-dim float64.
        realised: the share of ``eps*`` that survived rounding to the precision of the weights,
            ``(w' - w) . eps* / ||eps*||^2``, 0-dim float64; 1 where nothing is rounded.
    """

    norm: Tensor
    realised: Tensor


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all elements of some tensors.

    ``||t||_2 = sqrt(sum_i ||t_i||_2^2)``

    Args:
        tensors: any shapes, any floating dtype (half precision is accumulated in float32),
            on one device.

    Returns:
        0-dim float64 tensor on that device; 0 for no tensors. Not read back to the host.
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
    """Whether lists are better taken as a whole than a tensor at a time.

    On a GPU, where starting a kernel for each of some hundred tensors takes longer than the
    kernels do. torch < 2.4 cannot take norms of half precision in float32 this way.
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
    """`move_along_` of lists whose tensors are of one kind each, and weights float32.

    Args:
        out: none of ``weights``; may be ``direction``.
        scale: 0-dim float32.
    """
    if out[0].dtype == direction[0].dtype == torch.float32:  # without memory beside them
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
    """Cut lists alike, so that the tensors of a group together have about `_PIECE` elements."""
    begin, filled = 0, 0
    for end, tensor in enumerate(lists[0], start=1):
        filled += tensor.numel()
        if filled >= _PIECE["cuda"] or end == len(lists[0]):
            yield tuple(tensors[begin:end] for tensors in lists)
            begin, filled = end, 0


def _radius_over_norm(rho: float, norm: Tensor) -> Tensor:
    """``rho / norm``; 0 where the norm is 0 (no ascent direction), NaN where it is not finite.

    The NaN is on purpose: it reaches the loss at the perturbed weights and with it the
    non-finite handling of the training loop, without a read of the device.
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
    """``out_i = w_i + scale * d_i``, in at least float32, then rounded.

    Args:
        out: receives the result; each may be its ``weights`` or ``direction`` itself.
        weights: ``w``, of any precision at least that of ``out``.
        direction: ``d``, same shapes; consumed one at a time, so that it may be a generator.
        scale: 0-dim tensor.
        rounding: default: to nearest.

    Returns:
        share of the movement that ``rounding`` left along its direction, see `Perturbation`.
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
    rho: float,
    rounding: Optional[StochasticRounding] = None,
) -> Perturbation:
    """Weights at the SAM perturbation.

    ``out = w + eps*``,  ``eps* = rho g / ||g||_2``

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, left as they are.
        grads: ascent gradient ``g``; its scale cancels. Under data parallelism already reduced,
            so that every process computes the same ``eps*``.
        rho: radius of the ball in weight space, at least 0.
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
    rho: float,
    eta: float,
    rounding: Optional[StochasticRounding] = None,
) -> Perturbation:
    """Weights at the adaptive (elementwise, scale-invariant) SAM perturbation.

    ``out = w + rho T^2 g / ||T g||_2``,  ``T = diag(|w| + eta)``

    The paper's T over all weights; the authors' code leaves T = 1 for parameters whose name
    does not contain "weight". With ``|w| + eta = 1`` everywhere this is `sam_ascent_`.

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, left as they are.
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
