"""A --user-dir that breaks a rank at a chosen moment; imports the plugin first.

The environment variable FAULT holds JSON: ``moment``, ``rank``, ``update`` (number of updates
done when it happens). Moments at which the process kills itself with SIGKILL:

    probe       the weights stand at the probe
    reduction   before the gradients of the ascent are reduced
    ascended    between ascent and descent
    save        half of a checkpoint is written
    copy        half of a checkpoint is copied to checkpoint_last.pt
    node        as ascended, and torchrun's agent, the parent process, with it

Moments at which the model's output is NaN, once: ``nan clean``, ``nan probe``, ``nan descent``.
``stop`` suspends the process between ascent and descent. SEEN names a file, to which every rank
appends a line of JSON an update: number of updates, digest of its weights, its log.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import signal

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.models.roberta import RobertaModel

from deltasam_fairseq import SharpnessAwareTrainer
from deltasam_fairseq.core import Perturber
from deltasam_fairseq.optim import SharpnessAwareOptimizer, sharpness_aware

FAULT = json.loads(os.environ.get("FAULT", "{}"))
TRAINERS = []


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def due(moment, late=0):
    first_life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
    return (
        FAULT.get("moment") == moment
        and FAULT["rank"] == rank()
        and TRAINERS
        and FAULT["update"] + late == TRAINERS[-1].get_num_updates()
        and first_life
    )


def kill_if(moment):
    if due(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "ascended" and due("node"):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "ascended" and due("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)


def hook(owner, name, before=None, after=None):
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if before:
            kill_if(before)
        result = original(*args, **kwargs)
        if after:
            kill_if(after)
        return result

    setattr(owner, name, wrapper)


hook(Perturber, "probe", after="probe")
hook(SharpnessAwareOptimizer, "all_reduce_grads", before="reduction")
hook(Perturber, "ascend", after="ascended")


def see(train_step):
    @functools.wraps(train_step)
    def wrapper(self, samples, raise_oom=False):
        TRAINERS.append(self)
        result = train_step(self, samples, raise_oom)
        if "SEEN" in os.environ:
            digest = hashlib.sha256()
            for p in self.get_model().parameters():
                digest.update(p.detach().float().numpy().tobytes())
            line = {"updates": self.get_num_updates(), "weights": digest.hexdigest()}
            line["log"] = {k: float(v) for k, v in (result or {}).items()}
            with open(f"{os.environ['SEEN']}.{rank()}", "a") as f:
                f.write(json.dumps(line) + "\n")
        return result

    return wrapper


SharpnessAwareTrainer.train_step = see(SharpnessAwareTrainer.train_step)


def poison(forward):
    """NaN once, at the chosen forward of the update."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        output, extra = forward(self, *args, **kwargs)
        if not TRAINERS or not FAULT:
            return output, extra
        core = sharpness_aware(TRAINERS[-1].optimizer).core
        place = "descent" if core.ready_to_step else "probe" if core.weights.moved else "clean"
        if due(f"nan {place}"):
            FAULT["moment"] = "over"
            output = output * float("nan")
        return output, extra

    return wrapper


RobertaModel.forward = poison(RobertaModel.forward)


def write_half(save):
    @functools.wraps(save)
    def wrapper(obj, f):
        if due("save"):
            whole = io.BytesIO()
            torch.save(obj, whole)
            f.write(whole.getvalue()[: whole.tell() // 2])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return save(obj, f)

    return wrapper


def copy_half(copyfile):
    @functools.wraps(copyfile)
    def wrapper(source, target, **kwargs):
        if due("copy") and "checkpoint_last" in str(target):
            with open(source, "rb") as s, open(target, "wb") as t:
                t.write(s.read()[: os.path.getsize(source) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return copyfile(source, target, **kwargs)

    return wrapper


checkpoint_utils._torch_persistent_save = write_half(checkpoint_utils._torch_persistent_save)
shutil.copyfile = copy_half(shutil.copyfile)

if os.environ.get("CPU_OVERFLOW"):  # fairseq's handling of an overflow calls .cuda()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
