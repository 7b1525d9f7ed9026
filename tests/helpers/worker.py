"""One rank of a process group that makes prescribed runs; writes what it saw.

    python -m tests.helpers.worker SPEC.json RANK

The specification: ``world_size``, ``port`` and ``runs``, each with ``argv`` of fairseq-train,
``dtype``, ``out`` (prefix of the file that is written) and ``updates``: for each update, for each
rank, for each micro-batch a list of sentence numbers; an empty list is a micro-batch that the
rank does not have. With ``same_noise`` criterions draw noise that depends on the sentence only.
With ``other_numbers`` rank 1 draws other random numbers from the same seed. An update that raises
ValueError ends its run.
"""

import json
import sys

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from deltasam_fairseq.algorithms import probe
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import fast_config, same_noise, tiny
from tests.helpers.float64_criterion import Float64SentencePrediction  # noqa: F401
from tests.helpers.parameter_criterion import ParameterCriterion  # noqa: F401

MIX = probe._mix
COLLECTIVES = "all_reduce all_gather broadcast reduce_scatter barrier".split()


def record(trainer, seen):
    """Have the trainer note g'_j and eps* as they come about."""
    sam = sharpness_aware(trainer.optimizer)
    if sam is None:
        return
    weighting, ascend = sam.core.parts.weighting, sam.core.ascend
    weigh = weighting.weigh

    def recording_weigh(*args):
        found = weigh(*args)
        seen["weights"].append(found.weights.clone())
        return found

    def recording_ascend(params, *args):
        before = [p.data.clone() for p in params]
        ascent = ascend(params, *args)
        moved = [p.data - b for p, b in zip(params, before)]
        seen["eps"].append(torch.cat([m.flatten() for m in moved]))
        return ascent

    weighting.weigh, sam.core.ascend = recording_weigh, recording_ascend


def count_collectives(counts):
    """Note name and bytes of every collective that is called through torch.distributed."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counting(*args, _original=original, _name=name, **kwargs):
            size = sum(a.numel() * a.element_size() for a in args if torch.is_tensor(a))
            counts.append((_name, size))
            return _original(*args, **kwargs)

        setattr(dist, name, counting)


def mix_differently(x):
    return MIX(x + 1)


def run(spec, rank, world_size, port, counts):
    argv = spec["argv"] + ["--distributed-world-size", str(world_size)]
    if world_size > 1:
        argv += ["--distributed-rank", str(rank), "--distributed-no-spawn"]
        argv += ["--distributed-init-method", f"tcp://127.0.0.1:{port}"]
        argv += ["--distributed-backend", "gloo"]
    init = distributed_utils.distributed_init if world_size > 1 else None
    trainer = tiny.build_trainer(argv, dtype=getattr(torch, spec["dtype"]), before=init)
    seen = {"weights": [], "eps": [], "logs": [], "collectives": []}
    record(trainer, seen)
    tiny.batches(trainer)
    dataset = trainer.task.dataset("train")
    _ = trainer.model, trainer.criterion, trainer.optimizer  # wrapped and built before counting
    probe._mix = mix_differently if spec.get("other_numbers") and rank == 1 else MIX
    for update in spec["updates"]:
        samples = [
            dataset.collater([dataset[i] for i in ids]) if ids else {} for ids in update[rank]
        ]
        counts.clear()
        try:
            log = trainer.train_step(samples)
        except ValueError as e:
            seen["error"] = str(e)
            break
        seen["collectives"].append(list(counts))
        seen["logs"].append({k: float(v) for k, v in log.items()})
    seen["parameters"] = torch.cat([p.data.flatten() for p in trainer._trainable()])
    if trainer.weight_average is not None:
        seen["average"] = trainer.weight_average.averages
    torch.save(seen, f"{spec['out']}.{rank}.pt")


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    fast_config.install()
    counts = []
    count_collectives(counts)
    if spec["runs"][0].get("same_noise"):
        same_noise.use()
    for each in spec["runs"]:
        run(each, int(sys.argv[2]), spec["world_size"], spec["port"], counts)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()  # rank 0 holds the store
