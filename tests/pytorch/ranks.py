"""One rank of a plain PyTorch loop in DistributedDataParallel.

    python -m tests.pytorch.ranks FOLDER PORT RANK

Two ranks with two micro-batches each, of other sizes on the other rank; every method makes three
updates. Written to FOLDER: weights, last gradients, and the sizes of what was reduced.
"""

import contextlib
import functools
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deltasam_fairseq.pytorch import SharpnessAware
from tests.pytorch import small

# Sizes of the micro-batches of each rank; one process has all in one.
SIZES = ((1, 2), (2, 1))


METHODS = [*small.PLAIN, "functional"]


def train(method, closures_of, wrap=None, seen=None):
    """Return the weights after three updates and the gradients of the last one."""
    model = small.model(dropout=0.0, dtype=torch.float64)
    wrapped = model if wrap is None else wrap(model)
    sam = SharpnessAware(wrapped, method, rho=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        if seen is not None:
            seen.clear()
        sam.backward(closures_of(wrapped, outputs=method == "functional"))
        optimizer.step()
    return small.weights(model), small.gradients(model)


def accumulate(method, closures_of, wrap=lambda model: model, **more):
    """Return the gradient of a call with every other micro-batch and one with the rest.

    The first is in DistributedDataParallel's ``no_sync``.
    """
    model = small.model(dropout=0.0, dtype=torch.float64)
    wrapped = wrap(model)
    sam, closures = SharpnessAware(wrapped, method, rho=0.5, **more), closures_of(wrapped, False)
    with getattr(wrapped, "no_sync", contextlib.nullcontext)():
        sam.backward(closures[::2], scale=0.5)
    sam.backward(closures[1::2], scale=0.5)
    return small.gradients(model)


def main(folder, port, rank):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    all_reduce, seen = dist.all_reduce, []

    def counting(tensor, *args, **kwargs):
        seen.append((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting

    def own(model, outputs):
        sizes = [size for each in SIZES for size in each]
        closures = small.closures(model, *sizes, dtype=torch.float64, outputs=outputs)
        return closures[2:] if rank else closures[:2]

    found = {}
    for bucket_view in (False, True):
        wrap = functools.partial(DistributedDataParallel, gradient_as_bucket_view=bucket_view)
        for method in METHODS:
            ends = train(method, own, wrap, seen)
            found[method, bucket_view] = (*ends, list(seen))
        for method in ("gsam", "delta_sam"):
            found["no_sync", method, bucket_view] = accumulate(method, own, wrap)
    found["group"] = accumulate("gsam", own, process_group=dist.group.WORLD)
    model = DistributedDataParallel(small.model())
    try:
        SharpnessAware(model).backward(small.closures(model, *([6] if rank else [3, 3])))
    except ValueError as e:
        found["error"] = str(e)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
