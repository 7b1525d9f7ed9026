"""Moves a model's weights to the probe and to ``w + eps*``, and back, bit for bit."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import (
    ROUNDING,
    Perturbation,
    StochasticRounding,
    asam_ascent_,
    direction_sum,
    directions,
    fill_direction_,
    global_norm,
    move_along_,
    probe_generator,
    resolvable_radius,
    sam_ascent_,
    update_generator,
)
from deltasam_fairseq.core.compiled_rounding import rounding_kernels
from deltasam_fairseq.core.parts import Parts
from deltasam_fairseq.core.weights import OverwrittenWeights, SwappedWeights


class Perturber:
    """Perturbs and restores weights, of a model in whatever training loop.

    One update is ``[probe, restore,] ascend, <forward and backward at w + eps*>, restore``. To
    resume, no state of its own is needed: probe and rounding depend on seed and update number
    only.

    Args:
        parts: the method.
        eta: of ASAM (Kwon et al. 2021), added to ``|w|``, unit of a weight; None for SAM.
        probe_radius: of the probe, L2 norm in weight space; default: see `probe`.

    Attributes:
        rho: radius of the perturbation in force, L2 norm in weight space.
        trained: all weights that train, perturbed or not, and their names; the training loop's to
            set.
        ready_to_step: whether an `ascend` or `skip_ascent` came after the last `restore`.
        half_dtype: precision of the weights in the forward if below float32, else None.
    """

    def __init__(
        self,
        parts: Parts,
        eta: Optional[float] = None,
        probe_radius: Optional[float] = None,
    ) -> None:
        self.parts = parts
        self.trained: Dict[Parameter, str] = {}
        self.rho: Union[float, Tensor] = parts.radius.rho
        self.eta = eta
        self.probe_radius = probe_radius
        self.weights: Union[SwappedWeights, OverwrittenWeights] = SwappedWeights()
        self.half_dtype: Optional[torch.dtype] = None
        self.probe_dtype: Optional[torch.dtype] = None
        self.ready_to_step = False
        self._thread = ThreadPoolExecutor(1)
        self._drawing: Optional[Tuple[int, int, Future]] = None
        self._ahead: Optional[Tuple[int, int, Tensor]] = None  # seed, update, R of the last probe

    def compute_in(
        self,
        dtype: torch.dtype,
        masters: Optional[Dict[Parameter, Tensor]] = None,
        tf32: bool = False,
        gradients: Optional[Dict[Parameter, Tensor]] = None,
        probe: Optional[torch.dtype] = None,
    ) -> None:
        """Say what precision the forward computes in; without it, float32 or better.

        Args:
            dtype: of the weights that the forward multiplies with.
            masters: the float32 copies of the model's weights that are stepped, if there are.
            tf32: whether products of float32 round to TF32, whose mantissa is float16's: the
                literal probe would drown in it, the ascent does not.
            gradients: of the copies, see `OverwrittenWeights`.
            probe: the coarsest dtype that the forward multiplies in, by frozen weights (LoRA) too;
                default: ``dtype``.
        """
        probe = probe or dtype
        self.half_dtype = dtype if torch.finfo(dtype).bits < 32 else None
        self.probe_dtype = probe if torch.finfo(probe).bits < 32 else None
        if tf32 and probe == torch.float32:
            self.probe_dtype = torch.float16
        self.weights = (
            SwappedWeights() if masters is None else OverwrittenWeights(masters, gradients)
        )

    @property
    def probes_centrally(self) -> bool:
        """Whether to probe behind w as well as ahead: in half precision and TF32.

        There no radius makes both rounding and curvature small enough; the central difference
        has no error from the curvature, for one more forward without graph.
        """
        return self.probe_dtype is not None

    @property
    def probe_signs(self) -> Tuple[float, ...]:
        """Where to probe, see `probe`."""
        return (1.0, -1.0) if self.probes_centrally else (1.0,)

    def draw_ahead(self, params: Sequence[Parameter], seed: int, update: int) -> None:
        """Begin to draw the direction of the next `probe` of these arguments in a thread.

        Only on a CPU, where it hides the time of drawing behind the clean forward if a core, or
        half of one, is free, and only where there is `room`. The numbers are the same.
        """
        self._wait_for_direction()  # an update that broke off may have left one
        room = self.weights.room(params)
        if room is not None and room[0].device.type == "cpu":
            generator = probe_generator(seed, update, room[0].device)
            drawing = self._thread.submit(self._fill, room, generator, 1)
            self._drawing = (seed, update, drawing)

    def _wait_for_direction(self) -> Optional[Tuple[int, int]]:
        """Wait for the thread of `draw_ahead`; return seed and update of what it has drawn."""
        if self._drawing is None:
            return None
        seed, update, drawing = self._drawing
        self._drawing = None
        drawing.result()
        return seed, update

    def probe(
        self, params: Sequence[Parameter], seed: int, update: int, sign: float = 1.0
    ) -> Tensor:
        """Move the weights to ``w + sign R u / ||u||``, ``u ~ N(0, I)`` (Eq. 3).

        R is rho where the forward computes in float32 or better. Half precision would round such
        a probe away; there R is one that the weights resolve, see `resolvable_radius`.
        --delta-sam-probe-radius overrides both.

        Args:
            params: all trainable weights, in the same order on every process.
            seed, update: what the draw depends on, see `probe_generator`.
            sign: of the direction, see `probe_signs`. The probe behind w that follows the one
                ahead draws nothing where there was room for u.

        Returns:
            R, 0-dim float64.
        """
        ahead, self._ahead = self._ahead, None
        values = self.weights.values(params)
        other_side = ahead is not None and sign < 0 and ahead[:2] == (seed, update)
        radius = ahead[2] if ahead and other_side else self._choose_probe_radius(values)

        def write(out: List[Tensor]) -> None:
            if out[0].element_size() < 4:
                u = self._direction(params, seed, update, drawn=other_side)
                _write_half_(out, values, u, sign * radius)
            elif other_side:
                _reflect_(out, values)
            else:
                self._draw(out, seed, update)
                move_along_(out, values, out, sign * radius / global_norm(out))

        with torch.autograd.profiler.record_function("sam-perturb"):
            self.weights.move(params, write)
        self._ahead = (seed, update, radius) if sign > 0 else None
        return radius

    def _choose_probe_radius(self, values: List[Tensor]) -> Tensor:
        """R, 0-dim float64, on the device of the weights."""
        if self.probe_radius is None and self.probe_dtype is not None:
            return resolvable_radius(values, self.probe_dtype).clamp(min=self.parts.radius.rho)
        radius = self.parts.radius.rho if self.probe_radius is None else self.probe_radius
        return torch.zeros((), dtype=torch.float64, device=values[0].device) + radius

    def _direction(
        self, params: Sequence[Parameter], seed: int, update: int, drawn: bool
    ) -> Iterable[Tensor]:
        """u in float32: in the room for it, or else drawn a weight at a time while it is read.

        Args:
            drawn: whether the room holds it.
        """
        room = self.weights.room(params)
        if room is None:
            return self._drawn_singly(params, probe_generator(seed, update, params[0].device))
        if not drawn:
            self._draw(room, seed, update)
        return room

    def _draw(self, out: List[Tensor], seed: int, update: int) -> None:
        """Draw u into ``out``, unless `draw_ahead` did."""
        with torch.autograd.profiler.record_function("sam-draw"):
            if self._wait_for_direction() != (seed, update):
                generator = probe_generator(seed, update, out[0].device)
                self._fill(out, generator, torch.get_num_threads())

    def _fill(self, out: List[Tensor], generator: torch.Generator, threads: int) -> None:
        fill_direction_(out, generator, threads)
        self.parts.weighting.shape_direction_(out)

    def _drawn_singly(
        self, params: Sequence[Parameter], generator: torch.Generator
    ) -> Iterator[Tensor]:
        for u in directions(params, generator):
            self.parts.weighting.shape_direction_([u])
            yield u

    def ascend(self, params: Sequence[Parameter], seed: int, update: int) -> Perturbation:
        """Move the weights to ``w + eps*`` along the gradients that they hold, reduced already.

        A parameter without gradient stays where it is. In half precision the step is taken
        from float32 and rounded stochastically, see `StochasticRounding`.

        Args:
            params: all trainable weights.
            seed, update: what the rounding depends on.

        Returns:
            a `Perturbation`, its norm in the units of the gradients that were found.
        """
        self._ahead = None  # what is left of its direction may be overwritten
        found = [(p, p.grad) for p in params if p.grad is not None]
        parameters = [p for p, _ in found]
        dense = [g.to_dense() if g.is_sparse else g for _, g in found]
        grads = self.parts.mask.masked(parameters, dense)
        values = self.weights.values(parameters)
        rounding = None
        if self.half_dtype is not None and grads:
            generator = update_generator(seed, update, ROUNDING, params[0].device)
            direction_in = grads[0].dtype if self.eta is None else torch.float32
            kernels = rounding_kernels(self.half_dtype, values[0], direction_in)
            rounding = StochasticRounding(self.half_dtype, generator, kernels)

        @torch.no_grad()
        def write(out: List[Tensor]) -> Perturbation:
            if self.eta is None:
                return sam_ascent_(out, values, grads, self.rho, rounding)
            return asam_ascent_(out, values, grads, self.rho, self.eta, rounding)

        with torch.autograd.profiler.record_function("sam-perturb"):
            ascent = self.weights.move(parameters, write)
        self.ready_to_step = True
        return ascent

    @property
    def draws(self) -> bool:
        """Whether an update draws numbers that must be the same on all ranks."""
        return self.parts.weighting.probes or self.half_dtype is not None

    def drawn(self, params: Sequence[Parameter], seed: int, update: int) -> Tensor:
        """`direction_sum` of the probe of these arguments; it costs one more drawing.

        It stands for the numbers of the stochastic rounding too, which the same kind of generator
        of the same device draws.
        """
        return direction_sum(params, probe_generator(seed, update, params[0].device))

    def skip_ascent(self) -> None:
        """This update is one of the base optimizer alone."""
        self._wait_for_direction()  # of an update that broke off: it writes where gradients go
        self.ready_to_step = True

    def restore(self) -> None:
        """Give the weights back their own values, bit for bit."""
        with torch.autograd.profiler.record_function("sam-restore"):
            self.weights.restore()
        self.ready_to_step = False


def _write_half_(
    out: List[Tensor], values: List[Tensor], u: Iterable[Tensor], step: Tensor
) -> None:
    """Write ``w + step u / ||u||``; ``||u||`` is sqrt(d) but for a share of 1 / sqrt(2 d)."""
    norm = sum(v.numel() for v in out) ** 0.5
    move_along_(out, values, u, (step / norm).float())


def _reflect_(out: List[Tensor], values: List[Tensor]) -> None:
    """Write w - d to the buffers, which are w + d."""
    torch._foreach_neg_(out)
    torch._foreach_add_(out, values, alpha=2)
