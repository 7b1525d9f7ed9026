"""One process over NCCL: the same updates as without, and what they send."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from deltasam_fairseq.trainer.gradient_sync import GradientSync
from tests.helpers import gpu, tiny

# All-reduces of an update: gradients of the descent; of the ascent; four numbers of delta-SAM.
SENT = {"adam": 1, "sam_adam": 2, "delta_sam_adam": 3}
BACKENDS = {
    "legacy_ddp": ["--ddp-backend", "legacy_ddp"],
    "pytorch_ddp": ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters"],
}


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a machine without network has no other
    where = tmp_path_factory.mktemp("nccl") / "rendezvous"
    torch.cuda.set_device(gpu.DEVICE)
    dist.init_process_group("nccl", init_method=f"file://{where}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    vars(distributed_utils.get_global_group).pop("_global_group", None)


@contextlib.contextmanager
def as_one_of_several(patch):
    """fairseq wraps a model for several processes only, and this package reduces between them."""
    patch.setattr(Trainer, "use_distributed_wrapper", True)
    patch.setattr(GradientSync, "needed", True)
    sent, own = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return own(tensor, *args, **kwargs)

    patch.setattr(dist, "all_reduce", all_reduce)
    yield sent


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("optimizer", list(SENT))
def test_one_process(nccl, classification, tmp_path, monkeypatch, optimizer, backend):
    """Bit for bit: averaging over one process divides by 1."""

    def train():
        more = ["--dropout", "0.1", *BACKENDS[backend]]
        trainer = gpu.build_trainer(classification, tmp_path, optimizer, *more)
        for sample in tiny.batches(trainer)[:2]:
            trainer.train_step([sample])
        return tiny.weights(trainer)

    alone = train()
    with monkeypatch.context() as patch, as_one_of_several(patch) as sent:
        together = train()
    assert all(map(torch.equal, alone, together))
    if backend == "legacy_ddp":
        assert len(sent) == 2 * SENT[optimizer]
    assert sent.count(32) == 2 * (optimizer == "delta_sam_adam")
