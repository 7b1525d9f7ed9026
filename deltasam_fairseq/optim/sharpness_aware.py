"""The optimizer wrapper: perturbs the model's weights and restores them before the base steps."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Type, Union

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import FairseqAdam
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
from deltasam_fairseq.optim.adam import choose_step
from deltasam_fairseq.optim.compiled_rounding import rounding_kernels
from deltasam_fairseq.optim.config import check_optimizer_config
from deltasam_fairseq.optim.weights import OverwrittenWeights, SwappedWeights

# Key of a checkpoint's optimizer state that holds float32 weights. It is not with the keys in
# trainer/checkpoint_state.py because optim may not import the trainer.
MASTERS = "sam_fp32_params"


class SharpnessAwareOptimizer(FairseqOptimizer):
    """A fairseq optimizer whose gradient is taken at ``w + eps*``.

    Wraps a base optimizer of fairseq, which it leaves as it is: all of fairseq's optimizer
    interface goes to the base. Beside it stands what the trainer needs: `probe`, `ascend`,
    `restore`. One update is

        ``[probe, restore,] ascend, <fairseq's own forward, backward, reduce, clip>, step``

    and `step` restores ``w`` before the base reads it. `step` refuses when no `ascend` (or
    `skip_ascent`) came before: without the trainer this would silently be the base optimizer.

    The perturbed weights are the model's own, which under --fp16 are not those that the base
    optimizer holds; therefore they are arguments here. To resume, no state of its own is
    needed: probe and rounding depend on seed and update number only.

    Args:
        cfg: options of the base optimizer and a `SAMConfig` (or `DeltaSAMConfig`), flat.
        params: parameters of the base optimizer.

    Raises:
        ValueError: for an option out of range.
    """

    base_class: Type[FairseqOptimizer]
    base_name: str

    def __init__(self, cfg: Any, params: Sequence[Parameter]) -> None:
        super().__init__(cfg)
        check_optimizer_config(cfg)
        self.base = self.base_class(cfg, params)
        if isinstance(self.base, FairseqAdam):
            choose_step(self.base, getattr(cfg, "adam_step", "auto"))
        self.rho: float = cfg.sam_rho
        self.eta: Optional[float] = cfg.sam_eta if cfg.sam_adaptive else None
        self.beta: float = getattr(cfg, "delta_sam_beta", 0.0)
        self.start_update: int = cfg.sam_start_update
        self.per_rank: bool = cfg.sam_scope == "rank"
        self.ascent_fraction: float = cfg.sam_ascent_fraction
        self.every: int = cfg.sam_every
        self.only: Optional[str] = cfg.sam_only
        self.probe_radius: Optional[float] = getattr(cfg, "delta_sam_probe_radius", None)
        self.weights: Union[SwappedWeights, OverwrittenWeights] = SwappedWeights()
        self.half_dtype: Optional[torch.dtype] = None
        self.probe_dtype: Optional[torch.dtype] = None
        self._ready_to_step = False
        self._thread = ThreadPoolExecutor(1)
        self._drawing: Optional[Tuple[int, int, Future]] = None
        self._ahead: Optional[Tuple[int, int, Tensor]] = None  # seed, update, R of the last probe

    def compute_in(
        self,
        dtype: torch.dtype,
        masters: Optional[Dict[Parameter, Tensor]] = None,
        tf32: bool = False,
        gradients: Optional[Dict[Parameter, Tensor]] = None,
    ) -> None:
        """Say what precision the forward computes in; without it, float32 or better.

        Args:
            dtype: of the weights that the forward multiplies with.
            masters: the float32 copies of the model's weights that are stepped, if there are.
            tf32: whether products of float32 round to TF32, whose mantissa is float16's: the
                literal probe would drown in it, the ascent does not.
            gradients: of the copies, see `OverwrittenWeights`.
        """
        self.half_dtype = dtype if torch.finfo(dtype).bits < 32 else None
        tf32 = tf32 and dtype == torch.float32
        self.probe_dtype = torch.float16 if tf32 else self.half_dtype
        self.weights = (
            SwappedWeights() if masters is None else OverwrittenWeights(masters, gradients)
        )

    def describe(self) -> str:
        """One line for the log: what this optimizer does, with its values."""
        method = "delta-SAM" if self.beta else "SAM"
        parts = [f"rho {self.rho:g}"]
        if self.beta:
            parts.append(f"beta {self.beta:g}")
        if self.eta is not None:
            parts.append(f"adaptive, eta {self.eta:g}")
        if self.per_rank:
            parts.append("each rank from its own shard")
        if self.ascent_fraction < 1:
            which = "the most unguarded" if self.beta else "a random"
            parts.append(f"ascent from {which} {self.ascent_fraction:g} of the sentences")
        if self.only is not None:
            parts.append(f"of weights that match {self.only}")
        if self.every > 1:
            parts.append(f"one update in {self.every}")
        if self.start_update:
            parts.append(f"from update {self.start_update} on")
        if self.half_dtype is not None:
            parts.append(f"rounded stochastically to {self.half_dtype}")
        elif self.probe_dtype is not None and self.beta:
            parts.append("probed as in float16, for products of float32 are made in TF32")
        if not self.rho:
            return f"{method} with rho 0: training is plain {self.base_name}"
        return f"{method} on {self.base_name}: " + ", ".join(parts)

    def active(self, update: int) -> bool:
        """Whether the update after ``update`` updates perturbs the weights."""
        since = update - self.start_update
        return self.rho > 0 and since >= 0 and since % self.every == 0

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
            drawing = self._thread.submit(fill_direction_, room, generator, 1)
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
                # ||u|| is sqrt(d) but for a share of 1 / sqrt(2 d).
                norm = sum(v.numel() for v in out) ** 0.5
                move_along_(out, values, u, (sign * radius / norm).float())
            elif other_side:  # the buffers still are w + R u / ||u||
                torch._foreach_neg_(out)
                torch._foreach_add_(out, values, alpha=2)
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
            return resolvable_radius(values, self.probe_dtype).clamp(min=self.rho)
        radius = self.rho if self.probe_radius is None else self.probe_radius
        return torch.full((), radius, dtype=torch.float64, device=values[0].device)

    def _direction(
        self, params: Sequence[Parameter], seed: int, update: int, drawn: bool
    ) -> Iterable[Tensor]:
        """u in float32: in the room for it, or else drawn a weight at a time while it is read.

        Args:
            drawn: whether the room holds it.
        """
        room = self.weights.room(params)
        if room is None:
            return directions(params, probe_generator(seed, update, params[0].device))
        if not drawn:
            self._draw(room, seed, update)
        return room

    def _draw(self, out: List[Tensor], seed: int, update: int) -> None:
        """Draw u into ``out``, unless `draw_ahead` did."""
        with torch.autograd.profiler.record_function("sam-draw"):
            if self._wait_for_direction() != (seed, update):
                generator = probe_generator(seed, update, out[0].device)
                fill_direction_(out, generator, torch.get_num_threads())

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
        grads = [g.to_dense() if g.is_sparse else g for _, g in found]
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
        self._ready_to_step = True
        return ascent

    @property
    def draws(self) -> bool:
        """Whether an update draws numbers that must be the same on all ranks."""
        return bool(self.beta) or self.half_dtype is not None

    def drawn(self, params: Sequence[Parameter], seed: int, update: int) -> Tensor:
        """`direction_sum` of the probe of these arguments; it costs one more drawing.

        It stands for the numbers of the stochastic rounding too, which the same kind of generator
        of the same device draws.
        """
        return direction_sum(params, probe_generator(seed, update, params[0].device))

    def skip_ascent(self) -> None:
        """This update is one of the base optimizer alone."""
        self._wait_for_direction()  # of an update that broke off: it writes where gradients go
        self._ready_to_step = True

    def restore(self) -> None:
        """Give the weights back their own values, bit for bit."""
        with torch.autograd.profiler.record_function("sam-restore"):
            self.weights.restore()
        self._ready_to_step = False

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """Restore the weights, then let the base optimizer step from them.

        Raises:
            RuntimeError: if no ascent was made for this step.
        """
        if not self._ready_to_step:
            raise RuntimeError(
                f"--optimizer {getattr(self.cfg, '_name', self.base_name)}: asked to step without "
                "an ascent. The training loop is not deltasam_fairseq's: start the run with "
                "fairseq-train or fairseq-hydra-train and --user-dir deltasam_fairseq, or build "
                "deltasam_fairseq.SharpnessAwareTrainer instead of fairseq.trainer.Trainer."
            )
        self.restore()
        self.base.step(closure, scale=scale, groups=groups)

    # The rest of fairseq's interface is the base optimizer's.

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.base.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.base.optimizer = optimizer

    @property
    def optimizer_config(self) -> Dict[str, Any]:
        return self.base.optimizer_config

    @property
    def param_groups(self) -> List[Dict[str, Any]]:
        return self.base.param_groups

    def __getstate__(self) -> Any:
        return self.base.__getstate__()

    def get_lr(self) -> float:
        return self.base.get_lr()

    def set_lr(self, lr: float) -> None:
        self.base.set_lr(lr)

    def state_dict(self) -> Dict[str, Any]:
        """The base optimizer's, and the float32 weights where it steps those of half precision.

        fairseq saves the half-precision weights only, and a resumed run goes on from them.
        """
        state = dict(self.base.state_dict())
        if isinstance(self.weights, OverwrittenWeights):
            state[MASTERS] = [p.data for p in self.params]
        return state

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides: Any = None) -> None:
        state = dict(state_dict)
        masters = state.pop(MASTERS, None)
        self.base.load_state_dict(state, optimizer_overrides)
        if isinstance(self.weights, OverwrittenWeights) and masters is not None:
            own = list(self.params)
            if [m.shape for m in masters] == [p.shape for p in own]:
                for p, master in zip(own, masters):
                    p.data.copy_(master)
                self.weights.sync_masters()

    def backward(self, loss: Tensor) -> None:
        self.base.backward(loss)

    def all_reduce_grads(self, module: torch.nn.Module) -> None:
        self.base.all_reduce_grads(module)

    def multiply_grads(self, c: Any) -> None:
        self.base.multiply_grads(c)

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        return self.base.clip_grad_norm(max_norm, aggregate_norm_fn)

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def average_params(self) -> None:
        self.base.average_params()

    def broadcast_global_state_dict(self, state_dict: Dict[str, Any]) -> Dict[str, Any]:
        return self.base.broadcast_global_state_dict(state_dict)

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        return self.base.supports_memory_efficient_fp16

    @property
    def supports_step_with_scale(self) -> bool:
        return self.base.supports_step_with_scale

    @property
    def supports_groups(self) -> bool:
        return self.base.supports_groups

    @property
    def supports_flat_params(self) -> bool:
        return self.base.supports_flat_params


def sharpness_aware(optimizer: FairseqOptimizer) -> Optional[SharpnessAwareOptimizer]:
    """The `SharpnessAwareOptimizer` in a fairseq optimizer, inside its precision wrappers.

    Args:
        optimizer: what fairseq's trainer holds: the optimizer itself, or FP16Optimizer,
            MemoryEfficientFP16Optimizer, AMPOptimizer around it.

    Returns:
        the optimizer, or None for any other.
    """
    for inner in ("fp32_optimizer", "wrapped_optimizer"):
        optimizer = getattr(optimizer, inner, optimizer)
    return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None


def masters_of(optimizer: FairseqOptimizer) -> Optional[Dict[Parameter, Tensor]]:
    """The float32 copies that fairseq's FP16Optimizer keeps of half-precision weights.

    Args:
        optimizer: what fairseq's trainer holds.

    Returns:
        the copy of every weight, in its shape, a view of what the base optimizer steps; None
        where there are no copies.
    """
    return _of_masters(optimizer, lambda master: master.data)


def gradients_of_masters(optimizer: FairseqOptimizer) -> Optional[Dict[Parameter, Tensor]]:
    """Their gradients, likewise, which FP16Optimizer allocates for the whole of a run.

    Each step it copies the gradients of the half-precision weights to them; between `zero_grad`
    and that nothing reads them.
    """
    return _of_masters(optimizer, lambda master: master.grad)


def _of_masters(
    optimizer: FairseqOptimizer, part: Callable[[Parameter], Optional[Tensor]]
) -> Optional[Dict[Parameter, Tensor]]:
    masters = getattr(optimizer, "fp32_params", None)
    if masters is None:
        return None
    params = list(optimizer.fp16_params)
    views: Dict[Parameter, Tensor] = {}
    if not isinstance(masters, dict):
        parts = [part(master) for master in masters]
        if any(found is None for found in parts):
            return None
        return {p: found for p, found in zip(params, parts) if found is not None}
    for device, flat in masters.items():
        whole = part(flat)
        if whole is None:
            return None
        own = [p for p in params if len(masters) == 1 or p.device.index == device]
        pieces = whole.split([p.numel() for p in own])
        views.update((p, piece.view_as(p)) for p, piece in zip(own, pieces))
    return views
