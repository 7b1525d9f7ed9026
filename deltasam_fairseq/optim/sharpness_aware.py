"""The optimizer wrapper: perturbs the model's weights and restores them before the base steps."""

from typing import Any, Dict, List, Optional, Sequence, Type

import torch
from fairseq.optim import FairseqOptimizer
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import (
    asam_ascent_,
    draw_direction_,
    move_along_,
    probe_generator,
    sam_ascent_,
)
from deltasam_fairseq.optim.config import check_optimizer_config
from deltasam_fairseq.optim.weights import MovedWeights


class SharpnessAwareOptimizer(FairseqOptimizer):
    """A fairseq optimizer whose gradient is taken at ``w + eps*``.

    Wraps a base optimizer of fairseq, which it leaves as it is: all of fairseq's optimizer
    interface goes to the base. Beside it stands what the trainer needs: `probe`, `ascend`,
    `restore`. One update is

        ``[probe, restore,] ascend, <fairseq's own forward, backward, reduce, clip>, step``

    and `step` restores ``w`` before the base reads it. `step` refuses when no `ascend` (or
    `skip_ascent`) came before: without the trainer this would silently be the base optimizer.

    The perturbed weights are the model's own, which under --fp16 are not those that the base
    optimizer holds; therefore they are arguments here. No state is added to the base
    optimizer's, and none of its own is needed to resume: the probe depends on seed and update
    number only.

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
        self.rho: float = cfg.sam_rho
        self.eta: Optional[float] = cfg.sam_eta if cfg.sam_adaptive else None
        self.beta: float = getattr(cfg, "delta_sam_beta", 0.0)
        self.start_update: int = cfg.sam_start_update
        self.per_rank: bool = cfg.sam_scope == "rank"
        self.weights = MovedWeights()
        self._ready_to_step = False

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
        if self.start_update:
            parts.append(f"from update {self.start_update} on")
        if not self.rho:
            return f"{method} with rho 0: training is plain {self.base_name}"
        return f"{method} on {self.base_name}: " + ", ".join(parts)

    def active(self, update: int) -> bool:
        """Whether the update after ``update`` updates perturbs the weights."""
        return self.rho > 0 and update >= self.start_update

    def probe(self, params: Sequence[Parameter], seed: int, update: int) -> None:
        """Move the weights to ``w + rho u / ||u||``, ``u ~ N(0, I)`` (Eq. 3).

        Args:
            params: all trainable weights, in the same order on every process.
            seed, update: what the draw depends on, see `probe_generator`.
        """
        buffers = self.weights.buffers(params)
        values = [p.data for p in params]
        norm = draw_direction_(buffers, probe_generator(seed, update, values[0].device))
        move_along_(buffers, values, buffers, self.rho / norm)
        self.weights.move(params, buffers)

    def ascend(self, params: Sequence[Parameter]) -> Tensor:
        """Move the weights to ``w + eps*`` along the gradients that they hold, reduced already.

        A parameter without gradient stays where it is.

        Args:
            params: all trainable weights.

        Returns:
            norm of the ascent gradient (of ``T g`` for ASAM), 0-dim float64, in the units of
            the gradients that were found (loss scale and normalisation not undone).
        """
        buffers = self.weights.buffers(params)
        climbing = [(p, b) for p, b in zip(params, buffers) if p.grad is not None]
        out: List[Tensor] = [b for _, b in climbing]
        values = [p.data for p, _ in climbing]
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p, _ in climbing]
        with torch.no_grad():
            if self.eta is None:
                norm = sam_ascent_(out, values, grads, self.rho)
            else:
                norm = asam_ascent_(out, values, grads, self.rho, self.eta)
        self.weights.move([p for p, _ in climbing], out)
        self._ready_to_step = True
        return norm

    def skip_ascent(self) -> None:
        """This update is one of the base optimizer alone."""
        self._ready_to_step = True

    def restore(self) -> None:
        """Give the weights back their own values, bit for bit."""
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
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides: Any = None) -> None:
        self.base.load_state_dict(state_dict, optimizer_overrides)

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
