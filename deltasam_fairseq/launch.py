"""Mends of fairseq's launching: torchrun's world size, and several processes on CPUs.

As fairseq is, without a mend (all seen by running it):

- torchrun on nodes of one GPU or none, no --distributed-world-size given: every process takes
  itself for the only one and trains alone, in the same save directory, with exit code 0;
- torchrun on CPUs: ZeroDivisionError, ``rank % torch.cuda.device_count()``;
- fairseq's own spawning on CPUs: an assertion, or nothing is trained and the exit code is 0;
- pytorch_ddp on CPUs: ValueError, it names a device for modules that have none.
"""

import contextlib
import functools
import os
from typing import Any, Iterator

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def world_size_of_torchrun(world_size: int) -> int:
    """The world size of this run, with torchrun's where fairseq would overlook it.

    Args:
        world_size: fairseq's --distributed-world-size; 1 where nothing is given and at most one
            GPU is seen.
    """
    if world_size == 1 and all(name in os.environ for name in _TORCHRUN):
        return int(os.environ["WORLD_SIZE"])
    return world_size


@contextlib.contextmanager
def _device_count(n: int) -> Iterator[None]:
    original = torch.cuda.device_count
    torch.cuda.device_count = lambda: n
    try:
        yield
    finally:
        torch.cuda.device_count = original


def _on_cpus(call_main: Any) -> Any:
    """fairseq counts GPUs to know how many processes to start, and which device is whose."""

    @functools.wraps(call_main)
    def wrapper(cfg: Any, main: Any, **kwargs: Any) -> Any:
        distributed = cfg.distributed_training
        if torch.cuda.device_count() or distributed.distributed_world_size == 1:
            return call_main(cfg, main, **kwargs)
        if distributed.distributed_backend == "nccl":
            distributed.distributed_backend = "gloo"
        started_already = all(name in os.environ for name in _TORCHRUN)
        with _device_count(1 if started_already else distributed.distributed_world_size):
            return call_main(cfg, main, **kwargs)

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def _without_device_ids(ddp: Any) -> Any:
    """DistributedDataParallel for modules on the CPU too."""

    @functools.wraps(ddp, updated=())
    def wrapper(module: torch.nn.Module, **kwargs: Any) -> Any:
        if all(p.device.type == "cpu" for p in module.parameters()):
            kwargs.update(device_ids=None, output_device=None)
        return ddp(module=module, **kwargs)

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Put the mends in place; does nothing the second time, and nothing where GPUs are."""
    if not hasattr(distributed_utils.call_main, "_deltasam"):
        distributed_utils.call_main = _on_cpus(distributed_utils.call_main)
    if not hasattr(distributed_fairseq_model.DistributedDataParallel, "_deltasam"):
        distributed_fairseq_model.DistributedDataParallel = _without_device_ids(
            distributed_fairseq_model.DistributedDataParallel
        )
