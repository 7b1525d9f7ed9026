"""Mends of fairseq's launching: torchrun's world size, and several processes on CPUs.

As fairseq is, without a mend (all seen by running it):

- torchrun on nodes of one GPU or none, no --distributed-world-size given: every process takes
  itself for the only one and trains alone, in the same save directory, with exit code 0;
- torchrun on CPUs: ZeroDivisionError, ``rank % torch.cuda.device_count()``;
- srun on CPUs: RuntimeError, every task but the first sets its CUDA device;
- fairseq's own spawning on CPUs: an assertion, or nothing is trained and the exit code is 0;
- pytorch_ddp on CPUs: ValueError, it names a device for modules that have none;
- validation that gathers predictions, on CPUs: TypeError, it gathers through a GPU's memory.
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


def _processes_of_this_node(world_size: int) -> int:
    """The number of GPUs that fairseq has to count on a node of CPUs."""
    if all(name in os.environ for name in _TORCHRUN):
        return 1
    if "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ:
        return world_size // int(os.environ.get("SLURM_NNODES", 1))
    return world_size


@contextlib.contextmanager
def _seeming_gpus(n: int) -> Iterator[None]:
    count, set_device = torch.cuda.device_count, torch.cuda.set_device
    torch.cuda.device_count = lambda: n
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.device_count, torch.cuda.set_device = count, set_device


def _on_cpus(call_main: Any) -> Any:
    """fairseq counts GPUs to know how many processes to start, and which device is whose."""

    @functools.wraps(call_main)
    def wrapper(cfg: Any, main: Any, **kwargs: Any) -> Any:
        distributed = cfg.distributed_training
        if torch.cuda.device_count() or distributed.distributed_world_size == 1:
            return call_main(cfg, main, **kwargs)
        if distributed.distributed_backend == "nccl":
            distributed.distributed_backend = "gloo"
        with _seeming_gpus(_processes_of_this_node(distributed.distributed_world_size)):
            return call_main(cfg, main, **kwargs)

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def _with_real_gpus(distributed_main: Any) -> Any:
    """The run itself sees how many GPUs there are; fairscale asks for their properties."""
    real = torch.cuda.device_count, torch.cuda.set_device

    @functools.wraps(distributed_main)  # pickled by name for a spawned process
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seeming = torch.cuda.device_count, torch.cuda.set_device
        torch.cuda.device_count, torch.cuda.set_device = real
        try:
            return distributed_main(*args, **kwargs)
        finally:
            torch.cuda.device_count, torch.cuda.set_device = seeming

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


def _through_host_memory(all_gather_list: Any) -> Any:
    """Gather objects of any size from all ranks; on GPUs as fairseq does it."""

    @functools.wraps(all_gather_list)
    def wrapper(data: Any, group: Any = None, max_size: int = 16384) -> Any:
        if torch.cuda.is_available():
            return all_gather_list(data, group=group, max_size=max_size)
        if group is None:
            group = distributed_utils.get_global_group()
        gathered = [None] * distributed_utils.get_world_size(group)
        torch.distributed.all_gather_object(gathered, data, group=group)
        return gathered

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Put the mends in place; does nothing the second time, and nothing where GPUs are."""
    if not hasattr(distributed_utils.call_main, "_deltasam"):
        distributed_utils.call_main = _on_cpus(distributed_utils.call_main)
        distributed_utils.distributed_main = _with_real_gpus(distributed_utils.distributed_main)
        distributed_utils.all_gather_list = _through_host_memory(distributed_utils.all_gather_list)
    if not hasattr(distributed_fairseq_model.DistributedDataParallel, "_deltasam"):
        distributed_fairseq_model.DistributedDataParallel = _without_device_ids(
            distributed_fairseq_model.DistributedDataParallel
        )
