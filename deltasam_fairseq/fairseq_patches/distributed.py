"""Workarounds for fairseq's launcher: torchrun's world size, and several processes on CPUs.

As fairseq is (all seen by running it):

- torchrun on nodes of one GPU or none, no --distributed-world-size given: every process takes
  itself for the only one and trains alone, in the same save directory, with exit code 0;
- torchrun on CPUs: ZeroDivisionError, ``rank % torch.cuda.device_count()``;
- srun on CPUs: RuntimeError, every task but the first sets its CUDA device;
- fairseq's own spawning on CPUs: an assertion, or nothing is trained and the exit code is 0;
- pytorch_ddp on CPUs: ValueError, it names a device for modules that have none;
- validation that gathers predictions, on CPUs: TypeError, it gathers through a GPU's memory.
"""

import contextlib
import os
from typing import Any, Iterator

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from deltasam_fairseq.fairseq_patches.patching import patch, replaced

_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def world_size_of_torchrun(world_size: int) -> int:
    """Return the world size of this run: torchrun's where fairseq would overlook it.

    Args:
        world_size: fairseq's --distributed-world-size; 1 where nothing is given and at most one
            GPU is seen.
    """
    if world_size == 1 and all(name in os.environ for name in _TORCHRUN):
        return int(os.environ["WORLD_SIZE"])
    return world_size


def _processes_of_this_node(world_size: int) -> int:
    """Return the number of GPUs that fairseq has to count on a node of CPUs."""
    if all(name in os.environ for name in _TORCHRUN):
        return 1
    if "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ:
        return world_size // int(os.environ.get("SLURM_NNODES", 1))
    return world_size


@contextlib.contextmanager
def _count_processes_as_gpus(n: int) -> Iterator[None]:
    """Let fairseq's launcher see ``n`` GPUs, on which it sets no device.

    It starts as many processes as it counts GPUs, and has no option for another number. Only its
    own code may run here: no data, model or training.
    """
    with replaced(torch.cuda, "device_count", lambda: n):
        with replaced(torch.cuda, "set_device", lambda device: None):
            yield


def _launch_on_cpus(call_main: Any, cfg: Any, main: Any, **kwargs: Any) -> Any:
    """``call_main``, with processes instead of GPUs where there are none."""
    distributed = cfg.distributed_training
    if torch.cuda.device_count() or distributed.distributed_world_size == 1:
        return call_main(cfg, main, **kwargs)
    if distributed.distributed_backend == "nccl":
        distributed.distributed_backend = "gloo"
    with _count_processes_as_gpus(_processes_of_this_node(distributed.distributed_world_size)):
        distributed_utils.infer_init_method(distributed)
        if distributed.distributed_init_method and not distributed.distributed_no_spawn:
            return call_main(cfg, main, **kwargs)  # starts others, which see what there is
    return call_main(cfg, main, **kwargs)  # trains in this process


def _drop_device_ids(ddp: Any, module: torch.nn.Module, **kwargs: Any) -> Any:
    """DistributedDataParallel for modules on the CPU too."""
    if all(p.device.type == "cpu" for p in module.parameters()):
        kwargs.update(device_ids=None, output_device=None)
    return ddp(module=module, **kwargs)


def _gather_through_host_memory(
    all_gather_list: Any, data: Any, group: Any = None, max_size: int = 16384
) -> Any:
    """Gather objects of any size from all ranks; on GPUs as fairseq does it."""
    if torch.cuda.is_available():
        return all_gather_list(data, group=group, max_size=max_size)
    if group is None:
        group = distributed_utils.get_global_group()
    gathered = [None] * distributed_utils.get_world_size(group)
    torch.distributed.all_gather_object(gathered, data, group=group)
    return gathered


def install() -> None:
    """Patch the launcher, data parallelism and gathering; no effect where GPUs are."""
    patch(distributed_utils, "call_main", _launch_on_cpus)
    patch(distributed_utils, "all_gather_list", _gather_through_host_memory)
    patch(distributed_fairseq_model, "DistributedDataParallel", _drop_device_ids)
