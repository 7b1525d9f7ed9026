"""FSAM's mask: the ascent moves the weights with the largest squared gradients."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import largest_mask, masked
from deltasam_fairseq.core.parts import Mask

# Keys of the state: packed booleans, number of weights, update of the last renewal.
BITS, WEIGHTS, RENEWED = "bits", "weights", "renewed"


class FisherMask(Mask):
    """The ``share`` of the weights with the largest squared gradients, see `largest_mask`.

    The squared gradients are those of the sentences of the update that renews the mask, summed over
    all processes, where the loop has a loss of every sentence: a backward each. Otherwise they are
    the squares of the ascent's own gradient, at no cost. Where one is not finite the mask stays as
    it was, all weights before the first, and the next update tries again.

    Args:
        share: of the weights, above 0, at most 1.
        every: updates from one renewal to the next.
    """

    def __init__(self, share: float, every: int) -> None:
        self._share, self._every = share, every
        self._params: Sequence[Parameter] = ()
        self._mask: Dict[Parameter, Tensor] = {}
        self._renewed: Optional[int] = None
        self._loaded: Optional[Dict[str, Any]] = None
        self._from_ascent_at: Optional[int] = None
        self.share: Optional[Tensor] = None

    def begin(self, update: int, passes: Any, params: Sequence[Parameter]) -> None:
        self._params = params
        self._take_loaded()
        due = self._renewed is None or update - self._renewed >= self._every
        self._from_ascent_at = update if due and not passes.per_sentence else None
        if due and passes.per_sentence:
            self._renew(_squared_gradients(passes, params), update)

    def _renew(self, scores: List[Tensor], update: int) -> None:
        mask = largest_mask(scores, self._share)
        if mask is not None:
            self._renewed = update
            self._set(mask)

    def _set(self, mask: List[Tensor]) -> None:
        self._mask = dict(zip(self._params, mask))
        chosen = torch.stack([m.sum() for m in mask]).sum().double()
        self.share = chosen / sum(m.numel() for m in mask)

    def masked(self, params: Sequence[Parameter], grads: List[Tensor]) -> List[Tensor]:
        if self._from_ascent_at is not None:
            squares = {p: g.float().square() for p, g in zip(params, grads)}
            scores = [squares[p] if p in squares else torch.zeros_like(p) for p in self._params]
            self._renew(scores, self._from_ascent_at)
            self._from_ascent_at = None
        return masked(grads, [self._mask[p] for p in params]) if self._mask else grads

    def describe(self) -> str:
        return f"Fisher mask of {self._share:g} of the weights, renewed every {self._every} updates"

    def state_dict(self) -> Dict[str, Any]:
        """Return the mask; tensors and plain values, empty before the first."""
        if self._loaded is not None:  # and not needed yet
            return self._loaded
        if self._renewed is None:
            return {}
        flat = torch.cat([m.flatten() for m in self._mask.values()]).cpu()
        bits = torch.from_numpy(np.packbits(flat.numpy()))
        return {BITS: bits, WEIGHTS: len(flat), RENEWED: self._renewed}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put a `state_dict` back. A mask of another number of weights is renewed at once."""
        self._mask, self._renewed, self.share = {}, None, None
        self._loaded = state or None

    def _take_loaded(self) -> None:
        state, self._loaded, params = self._loaded, None, self._params
        if state is None or state[WEIGHTS] != sum(p.numel() for p in params):
            return
        flat = torch.from_numpy(np.unpackbits(state[BITS].cpu().numpy())[: state[WEIGHTS]]).bool()
        pieces = zip(params, flat.split([p.numel() for p in params]))
        self._set([piece.view_as(p).to(p.device) for p, piece in pieces])
        self._renewed = state[RENEWED]


def _squared_gradients(passes: Any, params: Sequence[Parameter]) -> List[Tensor]:
    """Return ``sum_j (dl_j / dw)^2`` over all sentences, times a constant; float32."""
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    passes.replay()
    for i in range(passes.count):
        with passes.no_sync_unless_last(last=False):
            losses = passes.losses(passes.forward(i))
        # A dummy's forward is made too: data-parallel wrappers may communicate in it.
        for loss in () if passes.is_dummy(i) else losses.unbind():
            grads = torch.autograd.grad(
                loss * passes.scale, list(params), retain_graph=True, allow_unused=True
            )
            for total, grad in zip(sums, grads):
                if grad is not None:
                    total.add_(grad.float().square())
    flat = torch.cat([total.flatten() for total in sums])
    passes.reduce(flat)
    pieces = flat.split([p.numel() for p in params])
    return [piece.view_as(p) for piece, p in zip(pieces, params)]
