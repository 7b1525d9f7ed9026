"""The parts of SAM that a method changes in an update, one base class each.

    SAM      eps* = rho grad(sum_j l_j) / ||...||,    step along grad(sum_j l_j)(w + eps*)

A method replaces one part, or several: the weights of the sentences in the ascent (`Weighting`),
rho (`Radius`), the weights that move (`Mask`), the gradient of the step (`Descent`). Parts combine.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import Reweighting, guardedness_sums, reweight

# Adds a tensor up over all processes of the ascent, in place; with op="max" takes the maximum.
Reduce = Callable[..., None]


class Weighting:
    """Weights of the sentences in the ascent's loss; here uniform (SAM, Foret et al. 2020).

    Attributes:
        probes: whether the weights depend on losses at a probe, ``w + rho u / ||u||``.
        name: of the method with these weights.
    """

    probes = False
    name = "SAM"

    def describe(self) -> str:
        """Return the options of the weights with their values, for the log."""
        return ""

    def shape_direction_(self, u: List[Tensor]) -> None:
        """Make the probe's direction of ``u ~ N(0, I)``, in place; here ``u`` itself."""

    def weigh(self, a: Tensor, reduce: Reduce) -> Reweighting:
        """Return the weights of this process's sentences in the global batch.

        Args:
            a: rise of the losses at a probe of radius rho, shape (B,), float64; B may be 0.
            reduce: see `Reduce`.

        Returns:
            a `Reweighting`; its ``weights`` are ``N p_j``, 1 for a uniform one.
        """
        raise NotImplementedError


class DeltaWeighting(Weighting):
    """delta-SAM's: ``N g'_j`` of Eq. 4 to 6, from the guardedness ``a``.

    Args:
        beta: scale of the reweighting, above 0.
    """

    probes = True
    name = "delta-SAM"

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def describe(self) -> str:
        return f"beta {self.beta:g}"

    def weigh(self, a: Tensor, reduce: Reduce) -> Reweighting:
        """See `reweight`; one reduction of four float64 numbers."""
        sums = guardedness_sums(a)
        reduce(sums)
        return reweight(a, sums, self.beta)


class Radius:
    """The radius of the perturbation, L2 norm in weight space; here constant.

    Args:
        rho: at least 0; the largest of the run.

    Attributes:
        varies: whether updates have other radii, which the log then has.
        needs_outputs: whether `in_force` compares outputs, see `Passes.divergence`.
    """

    varies = False
    needs_outputs = False

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def active(self, update: int) -> bool:
        """Whether the update after ``update`` updates perturbs the weights at all."""
        return self.rho > 0

    def describe(self) -> str:
        """Return a few words for the log."""
        return f"rho {self.rho:g}"

    def in_force(self, update: int, passes: Any, perturber: Any = None) -> Union[float, Tensor]:
        """Return rho of one ascent, a number or 0-dim tensor; called once its gradient is there.

        Args:
            update: number of updates done.
            passes: the ascent's `deltasam_fairseq.core.passes.Passes`, at w.
            perturber: moves the weights; they are at w again afterwards.
        """
        return self.rho

    def before_step(self, params: Dict[Parameter, str]) -> None:
        """Take note of w, which the optimizer steps from next; not where it skips the step.

        Args:
            params: all weights that train, and their names.
        """

    def before_backward(self, params: Dict[Parameter, str]) -> None:
        """Take note of w in a loop that sees no steps: there was one since if w is another.

        Args:
            params: as of `before_step`.
        """

    def state_dict(self) -> Dict[str, Any]:
        """Return what a resumed run needs; tensors and plain values."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put a `state_dict` back."""


class Mask:
    """Which elements of the weights the ascent moves; here all.

    Attributes:
        share: of the perturbed weights that moves, 0-dim; None where it is not to be logged.
    """

    share: Optional[Tensor] = None

    def begin(self, update: int, passes: Any, params: Sequence[Parameter]) -> None:
        """Get ready for the ascent of an update, at w; leaves no gradient in ``p.grad``.

        Args:
            update: number of updates done.
            passes: the ascent's `deltasam_fairseq.core.passes.Passes`.
            params: the perturbed weights.
        """

    def state_dict(self) -> Dict[str, Any]:
        """Return what a resumed run needs; tensors and plain values."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put a `state_dict` back."""

    def describe(self) -> str:
        """Return a few words for the log, none for SAM."""
        return ""

    def masked(self, params: Sequence[Parameter], grads: List[Tensor]) -> List[Tensor]:
        """Return what the ascent moves ``params`` along, whose norm counts; here ``grads``."""
        return grads


class Descent:
    """What the step's gradient is computed from; here the loss at ``w + eps*``.

    Attributes:
        corrects: whether `correct_` does anything.
        along_outputs: whether the step's gradient is ``J_z(w + eps*)^T dL/dz(w)``, z the model's
            outputs (functional SAM); the training loop keeps ``dL/dz``.
    """

    corrects = False
    along_outputs = False

    def keep(self, params: Sequence[Parameter], divisor: Union[float, Tensor]) -> None:
        """Take note of the ascent's reduced gradient, in ``p.grad``, before the weights move.

        Args:
            params: the perturbed weights.
            divisor: what the gradient lacks to the scale that the descent's will have.
        """

    def loss(self, i: int, losses: Tensor) -> Tensor:
        """Return what micro-batch ``i`` takes the gradient of, a sum over its losses (B,)."""
        return losses.sum()

    def correct_(self, grads: Mapping[Parameter, Tensor]) -> None:
        """Change the descent's gradients in place, after reduction and before clipping.

        Args:
            grads: of all trained weights that have one, in the units of what `keep` found, and in
                the precision in which the optimizer reads them.
        """

    def describe(self) -> str:
        """Return a few words for the log, none for SAM."""
        return ""


@dataclass
class Parts:
    """One method: a part for every place of the update where methods differ."""

    radius: Radius
    weighting: Weighting = field(default_factory=Weighting)
    mask: Mask = field(default_factory=Mask)
    descent: Descent = field(default_factory=Descent)
