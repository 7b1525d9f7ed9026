"""One update on a GPU is that of a CPU in float32, as far as its precision goes."""

import pytest
import torch
from fairseq.logging import metrics

from deltasam_fairseq.core import parts
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import gpu, tiny
from tests.helpers.twin import NO_DROPOUT

# Largest share by which |a_j| differ in sum, least cosine of eps*, largest share by which the norm
# of the descent's gradient differs. float32: the order of sums, magnified in a_j, which is a
# difference of losses; float16 has 11 bits, bfloat16 has 8.
BOUNDS = {"fp32": (0.02, 0.999, 1e-3), "fp16": (0.1, 0.99, 0.02), "bf16": (0.25, 0.95, 0.1)}
BOUNDS_OF = {mode: BOUNDS["bf16" if "bf16" in mode else "fp16"] for mode in gpu.MODES}
BOUNDS_OF["fp32"] = BOUNDS["fp32"]


def update(trainer, monkeypatch):
    """One update: guardedness, eps* and the log; weights must come back bit for bit."""
    seen, found, reweight = [], [], parts.reweight
    before = tiny.weights(trainer)
    hook = trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(moved(trainer)))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "reweight", lambda a, *more: found.append(a) or reweight(a, *more))
        with metrics.aggregate(new_root=True) as agg:
            trainer.train_step(tiny.batches(trainer)[:1])
    hook.remove()
    assert all(map(torch.equal, tiny.weights(trainer), before))  # the learning rate is 0
    assert not sharpness_aware(trainer.optimizer).core.weights.moved
    eps = seen[-1] - torch.cat([w.flatten() for w in before]).cpu().double()
    log = {key: float(agg[key].avg) for key in ("loss", "sam_loss", "gnorm")}
    return found[0].cpu() if found else None, eps, log


def moved(trainer):
    return torch.cat([w.flatten() for w in tiny.weights(trainer)]).cpu().double()


@pytest.mark.parametrize("mode", list(gpu.MODES))
@pytest.mark.parametrize("optimizer", gpu.OPTIMIZERS)
def test_one_update(classification, tmp_path, monkeypatch, optimizer, mode):
    gpu.draw_on_the_host(monkeypatch)
    options = [*NO_DROPOUT, "--lr", "0", "--sam-rho", "0.2"]
    trainer = gpu.build_trainer(classification, tmp_path, optimizer, *options, *gpu.MODES[mode])
    assert {p.device for p in trainer.get_model().parameters()} == {gpu.DEVICE}
    a, eps, log = update(trainer, monkeypatch)
    argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *options)
    exact_a, exact_eps, exact_log = update(tiny.build_trainer(argv), monkeypatch)
    of_a, of_eps, of_norm = BOUNDS_OF[mode]
    if exact_a is not None:
        assert (a - exact_a).abs().sum() < of_a * exact_a.abs().sum()
    assert exact_eps.norm().item() == pytest.approx(0.2, rel=1e-3)
    assert torch.cosine_similarity(eps, exact_eps, dim=0) > of_eps
    assert eps.norm().item() == pytest.approx(0.2, rel=0.3 if "bf16" in mode else 0.02)
    assert log == pytest.approx(exact_log, rel=of_norm)


@pytest.mark.parametrize("mode", list(gpu.MODES))
@pytest.mark.parametrize("optimizer", gpu.OPTIMIZERS)
def test_parameters_keep_their_memory(classification, tmp_path, optimizer, mode):
    """What a CUDA graph of the user's, or a kernel under way, was given: the same addresses."""
    trainer = gpu.build_trainer(classification, tmp_path, optimizer, *gpu.MODES[mode])
    where = [p.data_ptr() for p in trainer.get_model().parameters()]
    before = tiny.weights(trainer)
    for sample in tiny.batches(trainer)[:2]:
        trainer.train_step([sample])
    assert [p.data_ptr() for p in trainer.get_model().parameters()] == where
    assert not all(map(torch.equal, tiny.weights(trainer), before))


OPTIONS = [
    "delta_sam_adam --sam-adaptive --sam-rho 0.5",
    "delta_sam_adam --sam-only layer_norm",
    "delta_sam_adam --sam-ascent-fraction 0.5",
    "delta_sam_adam --sam-every 2",
    "delta_sam_adam --delta-sam-weights gibbs",
    "sam_adam --sam-micro 3",
    "sam_adam --sam-gsam-alpha 0.4 --sam-rho-schedule lr",
    "sam_adam --sam-functional",
    "sam_adam --sam-mask fisher --sam-mask-every 1",
    "sam_adam --sam-radius trust_region --sam-trust-sigma 0.1",
    "sam_adam --sam-radius trust_region_theta",
]


@pytest.mark.parametrize("mode", ["flat-fp16", "memory-efficient-bf16", "amp"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_with_two_micro_batches(classification, tmp_path, options, mode):
    more = [*options.split(), "--dropout", "0.1", *gpu.MODES[mode]]
    trainer = gpu.build_trainer(classification, tmp_path, *more)
    samples = tiny.batches(trainer)
    for pair in (samples[:2], samples[2:4]):
        assert torch.isfinite(torch.as_tensor(float(trainer.train_step(pair)["loss"])))
    assert trainer.get_num_updates() == 2
    assert all(torch.isfinite(w).all() for w in tiny.weights(trainer))


def test_a_graph_sees_the_weights_after_updates(classification, tmp_path):
    """A captured part of the model, replayed, computes with what SAM's updates left there."""
    trainer = gpu.build_trainer(classification, tmp_path, "delta_sam_adam", "--lr", "0.01")
    samples = tiny.batches(trainer)
    trainer.train_step(samples[:1])
    layer = trainer.get_model().encoder.sentence_encoder.layers[0]

    @torch.no_grad()
    def part(x):
        return layer.fc2(layer.fc1(x).relu())

    x = torch.randn(8, 4, 16, device=gpu.DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        part(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = part(x)
    graph.replay()
    first = out.clone()
    torch.testing.assert_close(first, part(x))
    trainer.train_step(samples[1:2])
    graph.replay()
    torch.testing.assert_close(out, part(x))
    assert not torch.allclose(out, first)
