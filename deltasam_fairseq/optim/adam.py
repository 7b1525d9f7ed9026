"""fairseq's Adam over lists of tensors, instead of a Python loop over tensors.

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    w <- w - lr lambda w
    w <- w - lr sqrt(1 - beta2^t) / (1 - beta1^t)  m / (sqrt(v) + eps)

fairseq adds eps before the correction of the bias, torch's Adam after it: torch's with
``eps / sqrt(1 - beta2^t)`` is the same.
"""

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.optim.adam import Adam
from torch import Tensor

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "loop", "foreach", "fused")
# Elements of the tensors that one call works on: bounds the memory of its intermediate results.
CHUNK = 1 << 25


@dataclass
class AdamStepConfig:
    """What the wrappers of Adam ask for beside Adam's own options."""

    adam_step: ChoiceEnum(IMPLEMENTATIONS) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "how Adam's step is computed: loop, as fairseq does it (one tensor after the "
            "other, or apex where it finds that); foreach, many tensors in one call; fused, all in "
            "one kernel, equal to rounding (torch 2.4 for CPUs, 2.0 for GPUs). auto (default): "
            "foreach on GPUs without apex, else loop; on CPUs foreach gains nothing. Weights that "
            "are not float32 take the loop"
        },
    )


def foreach_adam_(
    params: List[Tensor],
    grads: List[Tensor],
    exp_avgs: List[Tensor],
    exp_avg_sqs: List[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in torch's operations on lists, in the order of fairseq's loop.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: w, g, m, v; float32, on one device.
        step: t, from 1.
        lr, beta1, beta2, eps, weight_decay: as above.
    """
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps)
    if weight_decay:
        torch._foreach_add_(params, params, alpha=-weight_decay * lr)
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -step_size)


def fused_adam_(
    params: List[Tensor],
    grads: List[Tensor],
    exp_avgs: List[Tensor],
    exp_avg_sqs: List[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in torch's fused kernel; arguments as of `foreach_adam_`."""
    count = torch.full((), float(step), device=params[0].device)  # without a wait for it
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps / math.sqrt(1 - beta2**step),
        amsgrad=False,
        maximize=False,
    )


def _require_fused(device: torch.device) -> None:
    one = [torch.ones(1, device=device) for _ in range(4)]
    hyperparameters = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "eps": 1.0, "weight_decay": 0.0}
    try:
        fused_adam_(*([t] for t in one), step=1, **hyperparameters)  # type: ignore[arg-type,misc]
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as e:
        raise ValueError(
            f"--adam-step fused: torch {torch.__version__} has no fused Adam for {device.type} "
            f"({str(e).splitlines()[0]}); use --adam-step foreach"
        ) from e


class MultiTensorAdam(Adam):
    """fairseq's Adam with the same state, so that checkpoints of either can be resumed by both.

    Weights that are not float32 and sparse gradients take fairseq's loop. The class and fairseq's
    options of Adam rebuild it, as --zero-sharding os does for every rank's share of the weights.

    Args:
        params: parameters or groups of them.
        config: fairseq's options of Adam.
    """

    _update = staticmethod(foreach_adam_)

    def __init__(self, params: Any, **config: Any) -> None:
        super().__init__(params, **config)
        self._says_loop = False

    def step(self, closure: Any = None) -> Any:
        """One step; the argument and the result are fairseq's."""
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if any(p.dtype != torch.float32 or p.grad.is_sparse for p in with_grad):
            if not self._says_loop:
                logger.info("--adam-step: not all weights are float32; fairseq's loop is taken")
                self._says_loop = True
            return super().step(closure)
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for step, params in self._chunks(group["params"]):
                    states = [self.state[p] for p in params]
                    grads = [p.grad for p in params if p.grad is not None]  # all of them
                    self._update(
                        [p.data for p in params],
                        [grad.data.float() for grad in grads],
                        [s["exp_avg"] for s in states],
                        [s["exp_avg_sq"] for s in states],
                        step=step,
                        lr=group["lr"],
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )
        return loss

    def _chunks(self, params: List[Tensor]) -> Iterator[Tuple[int, List[Tensor]]]:
        """Advance the states; yield parameters of the same device and step count, with it."""
        alike: Dict[Tuple[torch.device, int], List[Tensor]] = defaultdict(list)
        for p in params:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = 0
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p.data)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(p.data)  # of a checkpoint that was read
            state["step"] += 1
            alike[p.device, state["step"]].append(p)
        for (_, step), same in alike.items():
            chunk: List[Tensor] = []
            size = 0
            for p in same:
                if chunk and size + p.numel() > CHUNK:
                    yield step, chunk
                    chunk, size = [], 0
                chunk.append(p)
                size += p.numel()
            yield step, chunk


class FusedAdam(MultiTensorAdam):
    """The same with torch's fused kernel.

    Raises:
        ValueError: there is no fused Adam for the device.
    """

    _update = staticmethod(fused_adam_)

    def __init__(self, params: Any, **config: Any) -> None:
        super().__init__(params, **config)
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            _require_fused(device)


def choose_step(base: Any, implementation: str) -> None:
    """Give fairseq's Adam another implementation of its step, if that is asked for.

    Args:
        base: fairseq's FairseqAdam, just built.
        implementation: of `IMPLEMENTATIONS`.

    Raises:
        ValueError: it cannot be had here.
    """
    own = base.optimizer
    device = own.param_groups[0]["params"][0].device
    if implementation == "auto":
        implementation = "foreach" if type(own) is Adam and device.type == "cuda" else "loop"
    if implementation != "loop":
        if getattr(base.cfg, "fp16_adam_stats", False):
            raise ValueError(
                f"--adam-step {implementation}: cannot keep --fp16-adam-stats, which is apex's; "
                "drop one of them"
            )
        groups = [dict(group) for group in own.param_groups]
        kind = FusedAdam if implementation == "fused" else MultiTensorAdam
        base._optimizer = kind(groups, **base.optimizer_config)
