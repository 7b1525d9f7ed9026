"""The plain loop and fairseq's trainer: the same model, batches, seed and method in float64."""

import copy

import pytest
import torch

from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.outputs import LogitsModel
from deltasam_fairseq.optim import sharpness_aware
from deltasam_fairseq.pytorch import SharpnessAware
from tests.helpers import tiny
from tests.helpers.float64_criterion import Float64SentencePrediction  # noqa: F401
from tests.pytorch import small

RHO, LR = 0.1, 0.1
OPTIONS = {
    "sam": ["sam_sgd"],
    "asam": ["sam_sgd", "--sam-adaptive"],
    "delta_sam": ["delta_sam_sgd", "--delta-sam-beta", "3"],
    "rw_sam": ["delta_sam_sgd", "--delta-sam-weights", "gibbs", "--delta-sam-lambda", "2"],
    "functional": ["sam_sgd", "--sam-functional"],
    "fsam": ["sam_sgd", "--sam-mask", "fisher", "--sam-mask-share", "0.1"],
    "tram_theta": ["sam_sgd", "--sam-radius", "trust_region_theta", "--sam-rho", "0.05"],
    "gsam": ["sam_sgd", "--sam-gsam-alpha", "0.4"],
}


def record(perturber, seen):
    """Note the weights of the sentences and w + eps*."""
    ascend, weighting = perturber.ascend, perturber.parts.weighting
    weigh = weighting.weigh

    def recording_weigh(*args):
        found = weigh(*args)
        seen.append(found.weights)
        return found

    def recording_ascend(params, *args):
        found = ascend(params, *args)
        seen.append(torch.cat([p.detach().flatten() for p in params]))
        return found

    perturber.ascend, weighting.weigh = recording_ascend, recording_weigh


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_same_updates(classification, tmp_path, method, micro_batches):
    """g'_j, w + eps* and the weights of three updates, with dropout; to float64 rounding."""
    optimizer, *more = OPTIONS[method]
    options = [optimizer, "--sam-rho", str(RHO), "--dropout", "0.1", *more]
    compare(classification, tmp_path, method, options, micro_batches)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_same_updates_of_tram(classification, tmp_path, micro_batches, monkeypatch):
    """With the same noise in both; they draw it differently. Without dropout, for the same d."""

    def noise(like):
        return torch.linspace(-1, 1, like.size(-1), dtype=like.dtype).sin().expand_as(like)

    def of_batch(batch, kind, size):
        return size * noise(batch.zeros()) * batch.mask.unsqueeze(-1)

    monkeypatch.setattr(Batch, "noise", of_batch)
    monkeypatch.setattr(torch, "randn_like", noise)
    options = ["sam_sgd", "--sam-radius", "trust_region", "--sam-trust-sigma", "0.1"]
    options += ["--dropout", "0", "--attention-dropout", "0"]
    compare(classification, tmp_path, "tram", options, micro_batches, sigma=0.1)


def compare(data, folder, method, options, micro_batches, **more):
    """Require the same updates of both paths."""
    argv = tiny.arguments(data, folder, "--optimizer", *options, "--lr", str(LR))
    argv += ["--criterion", "float64_sentence_prediction"]
    trainer = tiny.build_trainer(argv, dtype=torch.float64)
    model, criterion = copy.deepcopy(trainer.get_model()), trainer.get_criterion()
    sam = SharpnessAware(model, method, RHO, seed=trainer.cfg.common.seed, **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen = [], []
    record(sharpness_aware(trainer.optimizer).core, seen[0])
    record(sam._perturber, seen[1])
    samples = tiny.batches(trainer)

    def losses(sample):
        seeing = LogitsModel(model, cut=False)
        return per_sentence_losses(criterion, seeing, sample).losses, seeing.logits[0]

    for update in range(3):
        batch = samples[update : update + micro_batches]
        trainer.train_step(batch)
        model.train()
        torch.manual_seed(trainer.cfg.common.seed + update)
        sam.backward([lambda s=s: losses(s) for s in batch])
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen[0]) == len(seen[1]) == (6 if "delta_sam_sgd" in options else 3)
    for ours, theirs in zip(*seen):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tiny.weights(trainer), small.weights(model), rtol=1e-9, atol=1e-11)
    assert sam.figures()["sharpness"] != 0  # the weights moved
