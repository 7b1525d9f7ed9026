"""Mend of fairseq's --fp16 for runs without a GPU.

As fairseq is, --fp16 keeps the float32 copies of all weights in one flat tensor, which it files
under ``torch.cuda.current_device()``: an error where there is no CUDA, before the first update.
The gradients are looked up under ``parameter.device.index``, which is None on a CPU.
"""

import functools
from typing import Any, Sequence

import torch
from fairseq.optim.fp16_optimizer import FP16Optimizer
from torch.nn import Parameter


def _filed_where_looked_up(build: Any) -> Any:
    @functools.wraps(build)
    def wrapper(cls: Any, args: Any, params: Sequence[Parameter], flatten: bool = True) -> Any:
        if any(p.is_cuda for p in params):
            return build(cls, args, params, flatten=flatten)
        current_device = torch.cuda.current_device
        torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
        try:
            return build(cls, args, params, flatten=flatten)
        finally:
            torch.cuda.current_device = current_device

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Put the mend in place; does nothing the second time."""
    build = FP16Optimizer.build_fp32_params
    if not hasattr(build, "_deltasam"):
        FP16Optimizer.build_fp32_params = classmethod(_filed_where_looked_up(build.__func__))
