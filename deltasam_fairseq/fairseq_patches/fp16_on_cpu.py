"""--fp16 without a GPU.

As fairseq is, --fp16 keeps the float32 copies of all weights in one flat tensor, which it files
under ``torch.cuda.current_device()``: an error where there is no CUDA, before the first update.
The gradients are looked up under ``parameter.device.index``, which is None on a CPU.
"""

from typing import Any, Sequence

import torch
from fairseq.optim.fp16_optimizer import FP16Optimizer
from torch.nn import Parameter

from deltasam_fairseq.fairseq_patches.patching import patch, replaced


def _file_where_looked_up(
    build: Any, cls: Any, args: Any, params: Sequence[Parameter], flatten: bool = True
) -> Any:
    if any(p.is_cuda for p in params):
        return build(cls, args, params, flatten=flatten)
    with replaced(torch.cuda, "current_device", lambda: None):
        return build(cls, args, params, flatten=flatten)


def install() -> None:
    """Let FP16Optimizer build its flat tensor on a CPU."""
    patch(FP16Optimizer, "build_fp32_params", _file_where_looked_up)
