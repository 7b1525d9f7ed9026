"""The optimizer wrapper: perturbs the model's weights and restores them before the base steps."""

from typing import Any, Callable, Dict, List, Optional, Sequence, Type

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import FairseqAdam
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.core import OverwrittenWeights, Perturber
from deltasam_fairseq.optim.adam import choose_step
from deltasam_fairseq.optim.config import check_optimizer_config
from deltasam_fairseq.optim.parts import eta_of, parts_of

# Key of a checkpoint's optimizer state that holds float32 weights. It is not with the keys in
# trainer/checkpoint_state.py because optim may not import the trainer.
MASTERS = "sam_fp32_params"


class SharpnessAwareOptimizer(FairseqOptimizer):
    """A fairseq optimizer whose gradient is taken at ``w + eps*``.

    Wraps a base optimizer of fairseq, which it leaves as it is: all of fairseq's optimizer
    interface goes to the base. The trainer moves the weights by ``core``. One update is

        ``core.ascend, <fairseq's own forward, backward, reduce, clip>, step``

    and `step` restores ``w`` before the base reads it. `step` refuses when no ``core.ascend`` (or
    `skip_ascent`) came before: without the trainer this would silently be the base optimizer.

    The perturbed weights are the model's own, which under --fp16 are not those that the base
    optimizer holds.

    Args:
        cfg: options of the base optimizer and a `SAMConfig` (or `DeltaSAMConfig`), flat.
        params: parameters of the base optimizer.

    Attributes:
        core: the `Perturber`.

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
        self.start_update: int = cfg.sam_start_update
        self.per_rank: bool = cfg.sam_scope == "rank"
        self.ascent_fraction: float = cfg.sam_ascent_fraction
        self.micro: Optional[int] = cfg.sam_micro
        self.every: int = cfg.sam_every
        self.only: Optional[str] = cfg.sam_only
        self.core = Perturber(
            parts_of(cfg, self.get_lr),
            eta=eta_of(cfg),
            probe_radius=getattr(cfg, "delta_sam_probe_radius", None),
        )

    def describe(self) -> str:
        """One line for the log: what this optimizer does, with its values."""
        core, weighting = self.core, self.core.parts.weighting
        parts = [core.parts.radius.describe()]
        if self.reweights:
            parts.append(weighting.describe())
        if core.eta is not None:
            parts.append(f"adaptive, eta {core.eta:g}")
        parts += filter(None, (core.parts.mask.describe(), core.parts.descent.describe()))
        if self.micro is not None:
            parts.append(f"one ascent for every {self.micro} sentences")
        if self.per_rank:
            parts.append("each rank from its own shard")
        if self.ascent_fraction < 1:
            which = "the most unguarded" if self.reweights else "a random"
            parts.append(f"ascent from {which} {self.ascent_fraction:g} of the sentences")
        if self.only is not None:
            parts.append(f"of weights that match {self.only}")
        if self.every > 1:
            parts.append(f"one update in {self.every}")
        if self.start_update:
            parts.append(f"from update {self.start_update} on")
        if core.half_dtype is not None:
            parts.append(f"rounded stochastically to {core.half_dtype}")
        elif core.probe_dtype is not None and self.reweights:
            parts.append("probed as in float16, for products of float32 are made in TF32")
        if not core.parts.radius.rho:
            return f"{weighting.name} with rho 0: training is plain {self.base_name}"
        return f"{weighting.name} on {self.base_name}: " + ", ".join(parts)

    @property
    def reweights(self) -> bool:
        """Whether the ascent weighs the sentences (delta-SAM, RW-SAM)."""
        return self.core.parts.weighting.probes

    def active(self, update: int) -> bool:
        """Whether the update after ``update`` updates perturbs the weights."""
        since = update - self.start_update
        return since >= 0 and since % self.every == 0 and self.core.parts.radius.active(update)

    def skip_ascent(self) -> None:
        """This update is one of the base optimizer alone."""
        self.core.skip_ascent()

    def restore(self) -> None:
        """Give the weights back their own values, bit for bit."""
        self.core.restore()

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """Restore the weights, then let the base optimizer step from them.

        Raises:
            RuntimeError: if no ascent was made for this step.
        """
        if not self.core.ready_to_step:
            raise RuntimeError(
                f"--optimizer {getattr(self.cfg, '_name', self.base_name)}: asked to step without "
                "an ascent. The training loop is not deltasam_fairseq's: start the run with "
                "fairseq-train or fairseq-hydra-train and --user-dir deltasam_fairseq, or build "
                "deltasam_fairseq.SharpnessAwareTrainer instead of fairseq.trainer.Trainer."
            )
        self.restore()
        self.core.parts.radius.before_step(self.core.trained)
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
        if isinstance(self.core.weights, OverwrittenWeights):
            state[MASTERS] = [p.data for p in self.params]
        return state

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides: Any = None) -> None:
        state = dict(state_dict)
        masters = state.pop(MASTERS, None)
        self.base.load_state_dict(state, optimizer_overrides)
        if isinstance(self.core.weights, OverwrittenWeights) and masters is not None:
            own = list(self.params)
            if [m.shape for m in masters] == [p.shape for p in own]:
                for p, master in zip(own, masters):
                    p.data.copy_(master)
                self.core.weights.sync_masters()

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


def gradients_to_step_along(
    optimizer: FairseqOptimizer, trained: Sequence[Parameter]
) -> Dict[Parameter, Tensor]:
    """The gradients that the base optimizer reads: float32 copies of half-precision ones.

    Args:
        optimizer: what fairseq's trainer holds, after the backward.
        trained: the trained weights.

    Returns:
        the gradient of every weight that has one, to be written to. Copies are made now, as
        FP16Optimizer makes them when it clips.
    """
    copies = gradients_of_masters(optimizer)
    if copies is not None:
        optimizer._sync_fp16_grads_to_fp32()
        return {p: copies[p] for p in trained}
    return {p: p.grad for p in trained if p.grad is not None}


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
