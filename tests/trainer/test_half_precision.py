"""Half precision in fairseq's trainer, as far as a CPU can run it; CUDA where there is one."""

import functools
import itertools
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from deltasam_fairseq.core.weights import OverwrittenWeights, SwappedWeights
from deltasam_fairseq.optim import masters_of, sharpness_aware
from tests.helpers import gpu, tiny

ROOT = Path(__file__).parents[2]
REGRESSION = ROOT / "tests" / "regression"

MODES = {name: words for name, words in gpu.MODES.items() if name != "fp32"}
OPTIMIZERS = gpu.OPTIMIZERS
everywhere = pytest.mark.parametrize("optimizer", OPTIMIZERS)
in_all_modes = pytest.mark.parametrize("mode", list(MODES))


@pytest.fixture(autouse=True)
def autocast_of_a_cpu(request, monkeypatch):
    """--amp as on a GPU: fairseq asks for CUDA's autocast and CUDA's scaler, and gets the CPU's,
    in CUDA's precision."""
    if getattr(request.node, "callspec", None) is None:
        return
    if request.node.callspec.params.get("mode") != "amp":
        return
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("before 2.3 torch's scaler of the loss is CUDA's alone")
    real = torch.autocast

    def autocast(device="cuda", enabled=True):
        return real("cpu", dtype=torch.float16, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.cuda.amp, "autocast", lambda enabled: autocast(enabled=enabled))
    scaler = functools.partial(torch.amp.GradScaler, "cpu")
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", scaler)


def build(data, tmp_path, optimizer, mode, *more):
    argv = tiny.arguments(data, tmp_path, "--optimizer", optimizer, "--dropout", "0.1")
    return tiny.build_trainer([*argv, *MODES[mode], *more])


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others))


@in_all_modes
@everywhere
def test_moves_and_comes_back_bitwise(classification, tmp_path, optimizer, mode):
    trainer = build(classification, tmp_path, optimizer, mode, "--lr", "0")
    before, seen = tiny.weights(trainer), []
    trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(tiny.weights(trainer)))
    for sample in tiny.batches(trainer):
        trainer.train_step([sample])
    dtype = sharpness_aware(trainer.optimizer).core.half_dtype
    assert dtype == (torch.bfloat16 if "bf16" in mode else torch.float16)
    assert before[0].dtype == (torch.float32 if mode == "amp" else dtype)
    assert any(not equal(weights, before) for weights in seen)
    for at_eps, own in zip(seen[-1], before):  # what the cast in a product leaves alone
        moved = at_eps[at_eps != own]
        assert torch.equal(moved.to(dtype).to(moved), moved)
    assert equal(tiny.weights(trainer), before)


@in_all_modes
@everywhere
def test_no_second_copy_where_there_are_float32_masters(classification, tmp_path, optimizer, mode):
    trainer = build(classification, tmp_path, optimizer, mode)
    weights = sharpness_aware(trainer.optimizer).core.weights
    masters = "memory" not in mode and mode != "amp"
    assert isinstance(weights, OverwrittenWeights if masters else SwappedWeights)
    trainer.train_step(tiny.batches(trainer)[:1])
    if isinstance(weights, OverwrittenWeights):
        for p, master in zip(trainer._trainable(), weights.values(trainer._trainable())):
            assert torch.equal(p, master.to(p.dtype)) and master.dtype == torch.float32


@in_all_modes
@everywhere
def test_resumed_is_uninterrupted_bitwise(classification, tmp_path, optimizer, mode):
    """Masters, optimizer state and the loss scaler's counters, which let the scale grow at the
    same update: with a window of 2 it grows between the checkpoint and the end."""
    more = ["--fp16-scale-window", "2"] if "fp16" in mode else []
    whole, resumed = assert_resumes(
        lambda: build(classification, tmp_path, optimizer, mode, *more), tmp_path
    )
    if "fp16" in mode:
        assert vars(whole.optimizer.scaler) == vars(resumed.optimizer.scaler)
        assert whole.optimizer.scaler.loss_scale > 128
    if mode == "amp":
        assert whole.optimizer.scaler.is_enabled()
        assert whole.optimizer.scaler.state_dict() == resumed.optimizer.scaler.state_dict()


def assert_resumes(make, tmp_path):
    """Weights, and what is stepped, after eight updates at once and after three and five."""
    whole = make()
    samples = tiny.batches(whole) * 2
    for i, sample in enumerate(samples):
        if i == 3:
            whole.consolidate_optimizer()
            state = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 3, "shuffle": True}}
            whole.save_checkpoint(str(tmp_path / "middle.pt"), state)
        whole.train_step([sample])
    resumed = make()
    samples = tiny.batches(resumed) * 2
    resumed.load_checkpoint(str(tmp_path / "middle.pt"))
    assert resumed.get_num_updates() == 3
    for sample in samples[3:]:
        resumed.train_step([sample])
    # Not fairseq 0.12's second copies, which nothing reads.
    assert equal(whole._trainable(), resumed._trainable())
    masters = [masters_of(t.optimizer) for t in (whole, resumed)]
    if masters[0] is not None:
        assert equal(*([m[p] for p in t._trainable()] for m, t in zip(masters, (whole, resumed))))
    return whole, resumed


def test_weights_changed_in_a_checkpoint_are_not_undone_by_its_masters(classification, tmp_path):
    trainer = build(classification, tmp_path, "sam_adam", "fp16", "--lr", "0")
    trainer.train_step(tiny.batches(trainer)[:1])
    trainer.consolidate_optimizer()
    state = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1, "shuffle": True}}
    trainer.save_checkpoint(str(tmp_path / "run.pt"), state)
    saved = torch.load(tmp_path / "run.pt", weights_only=False)
    saved["model"] = {k: v / 2 if v.is_floating_point() else v for k, v in saved["model"].items()}
    torch.save(saved, tmp_path / "halved.pt")
    resumed = build(classification, tmp_path, "sam_adam", "fp16", "--lr", "0")
    resumed.load_checkpoint(str(tmp_path / "halved.pt"))
    halved = tiny.weights(resumed)
    resumed.train_step(tiny.batches(resumed)[:1])
    assert equal(tiny.weights(resumed), halved) and not equal(halved, tiny.weights(trainer))


@pytest.mark.parametrize("mode", ["fp16", "amp"])
@pytest.mark.parametrize("micro_batches, forwards", [(1, [True, False, False, True]), (2, None)])
def test_forwards_of_an_update(classification, tmp_path, mode, micro_batches, forwards):
    """With graph or without: the losses ahead and behind stand for clean ones of their own."""
    if forwards is None:
        forwards = [*[False] * 4, *[True] * 2, *[True] * 2]
    trainer = build(classification, tmp_path, "delta_sam_adam", mode)
    samples, seen = tiny.batches(trainer), []
    trainer.train_step(samples[:micro_batches])  # the first one also checks the criterion
    trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    trainer.train_step(samples[:micro_batches])
    assert seen == forwards


def spoil_gradient_at(trainer, call):
    """Make the gradient of the call'th backward infinite: 1 is the ascent, 2 the descent."""
    original, calls = trainer.task.train_step, []

    def train_step(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            next(p for p in trainer._trainable() if p.grad is not None).grad.fill_(float("inf"))
        return result

    trainer.task.train_step = train_step


overflows = pytest.mark.parametrize("where, call", [("ascent", 1), ("descent", 2)])


@pytest.mark.parametrize("mode", ["fp16", "flat-fp16", "memory-efficient-fp16"])
@overflows
def test_overflow_skips_the_update_once(classification, tmp_path, mode, where, call):
    """The scale is halved once, w is untouched, the next update is made; counted where it was."""
    from fairseq.logging import metrics

    trainer = build(classification, tmp_path, "sam_adam", mode)
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    spoil_gradient_at(trainer, call)
    with metrics.aggregate() as agg:
        assert trainer.train_step(samples[:1]) is None
        assert equal(tiny.weights(trainer), before) and trainer.get_num_updates() == 0
        assert trainer.optimizer.scaler.loss_scale == 64
        assert trainer.train_step(samples[:1]) is not None
    assert trainer.optimizer.scaler.loss_scale == 64 and trainer.get_num_updates() == 1
    assert agg[f"sam_overflows_{where}"].sum == 1
    assert f"sam_overflows_{'descent' if where == 'ascent' else 'ascent'}" not in agg


@pytest.mark.parametrize("mode", ["amp"])
@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("groups", [[], ["--sam-micro", "4"]], ids=" ".join)
@overflows
def test_overflow_under_amp_is_retried_or_skipped(
    classification, tmp_path, mode, retries, groups, where, call
):
    """fairseq repeats the update of the same batch at half the scale, as often as it may."""
    from fairseq.logging import metrics

    more = ("--amp-batch-retries", str(retries), *groups)
    trainer = build(classification, tmp_path, "sam_adam", mode, *more)
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    spoil_gradient_at(trainer, call)
    with metrics.aggregate() as agg:
        done = trainer.train_step(samples[:1]) is not None
        assert done == bool(retries) and trainer.get_num_updates() == int(done)
        assert equal(tiny.weights(trainer), before) != done
        assert trainer.train_step(samples[1:2]) is not None
    assert trainer.optimizer.scaler.get_scale() == 64
    assert agg[f"sam_overflows_{where}"].sum == 1  # also where a retry follows
    assert f"sam_overflows_{'descent' if where == 'ascent' else 'ascent'}" not in agg


@pytest.mark.parametrize("mode", ["amp"])
def test_overflow_of_every_retry_is_counted_once(classification, tmp_path, mode):
    """Two batches, each tried three times, each time at half the scale."""
    from fairseq.logging import metrics

    trainer = build(classification, tmp_path, "sam_adam", mode)
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    original = trainer.task.train_step

    def overflowing(*args, **kwargs):
        result = original(*args, **kwargs)
        next(p for p in trainer._trainable() if p.grad is not None).grad.fill_(float("inf"))
        return result

    trainer.task.train_step = overflowing
    with metrics.aggregate() as agg:
        for sample in samples[:2]:
            assert trainer.train_step([sample]) is None
    assert agg["sam_overflows_ascent"].sum == 6 and trainer.get_num_updates() == 0
    assert trainer.optimizer.scaler.get_scale() == 128 / 2**6
    assert equal(tiny.weights(trainer), before)


@in_all_modes
@pytest.mark.parametrize(
    "micro_batches, more",
    [
        (1, []),
        (2, []),
        (1, ["--sam-ascent-fraction", "0.5"]),
        (1, ["--delta-sam-weights", "gibbs"]),
        (2, ["--delta-sam-weights", "gibbs"]),
    ],
)
def test_guardedness_in_an_update(classification, tmp_path, monkeypatch, mode, micro_batches, more):
    """As the trainer finds it, against float32, with random weights of a tiny model."""
    found = []
    for options in (MODES[mode], []):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam", *options)
        trainer = tiny.build_trainer([*argv, "--dropout", "0.1", *more])
        weighting = sharpness_aware(trainer.optimizer).core.parts.weighting

        def spied(a, reduce, weigh=weighting.weigh):
            found.append(a)
            return weigh(a, reduce)

        monkeypatch.setattr(weighting, "weigh", spied)
        trainer.train_step(tiny.batches(trainer)[:micro_batches])
    half, exact = found
    assert half.shape == exact.shape == (8 * micro_batches,)
    bound = 0.25 if "bf16" in mode else 0.1
    assert (half - exact).abs().sum() < bound * exact.abs().sum()


METHODS = [  # of the family; the other modes are tested method by method
    "sam_adam --sam-gsam-alpha 0.4",
    "sam_adam --sam-functional",
    "sam_adam --sam-mask fisher --sam-mask-every 3",
    "delta_sam_adam --delta-sam-weights gibbs",
]


@pytest.mark.parametrize(
    "optimizer, mode",
    [
        *itertools.product([*OPTIMIZERS, "sam_adam --sam-micro 2"], ["flat-fp16", "amp"]),
        *((method, "amp") for method in METHODS),
    ],
)
def test_trains_like_float32(classification, tmp_path, optimizer, mode):
    """The losses of eight updates, with a radius at which those of Adam are others."""

    def losses(*options):
        trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *options))
        return torch.tensor([trainer.train_step([s])["loss"] for s in tiny.batches(trainer) * 2])

    sam = ("--optimizer", *optimizer.split(), "--sam-rho", "0.2")
    exact = losses(*sam)
    apart = (losses("--optimizer", "adam") - exact).abs().max()
    assert apart > 0.03 and (losses(*sam, *MODES[mode]) - exact).abs().max() < apart / 2


@pytest.mark.parametrize("mode", ["amp"])
def test_trust_region_under_amp(classification, tmp_path, mode):
    """d of TRAM-theta in the second update, after a first one with a large learning rate."""
    found = []
    for words in (MODES[mode], []):
        more = ["--optimizer", "sam_adam", "--sam-radius", "trust_region_theta", "--lr", "0.02"]
        trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *more, *words))
        for sample in tiny.batches(trainer)[:2]:
            trainer.train_step([sample])
        found.append(float(sharpness_aware(trainer.optimizer).core.rho))
    assert found[0] == pytest.approx(found[1], rel=0.1) and found[1] > 0.01


@pytest.mark.parametrize("mode", ["amp"])
def test_fairseq_divides_amps_gradients_by_the_scale_twice(classification, tmp_path, mode):
    """What docs/half_precision.md warns of: once it is false, the warning goes."""
    norms = {}
    for name, options in (("amp", MODES[mode]), ("float32", [])):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "sgd", *options)
        trainer = tiny.build_trainer([*argv, "--lr", "0"])
        trainer.train_step(tiny.batches(trainer)[:1])
        grads = [p.grad for p in trainer._trainable() if p.grad is not None]
        norms[name] = torch.stack([g.norm() for g in grads]).norm()
    assert norms["float32"] / norms["amp"] == pytest.approx(128, rel=0.01)


@everywhere
def test_loss_scale_does_not_change_the_ascent(classification, tmp_path, optimizer):
    """Powers of two scale fp16 gradients exactly as long as none underflows."""
    ends = []
    for scale in ("16", "128"):
        trainer = build(classification, tmp_path, optimizer, "fp16", "--fp16-init-scale", scale)
        seen = []
        trainer.get_model().register_forward_pre_hook(
            lambda *_, s=seen, t=trainer: s.append(tiny.weights(t))
        )
        trainer.train_step(tiny.batches(trainer)[:1])
        ends.append(seen[-1])  # of the descent's forward, the last one
    gap = max((a.float() - b.float()).abs().max() for a, b in zip(*ends))
    assert gap < 1e-3  # one unit in the last place of weights below 1, from gradients that round


def test_masters_of_flat_fp16_are_views_in_order():
    """As FP16Optimizer keeps them on a GPU: one flat tensor, 2 x 3 and then 4 numbers."""
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    flat = torch.nn.Parameter(torch.arange(10.0))
    masters = masters_of(Namespace(fp16_params=params, fp32_params={0: flat}))
    assert masters[params[0]].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert masters[params[1]].tolist() == [6, 7, 8, 9]
    flat.data.mul_(2)
    assert masters[params[1]].tolist() == [12, 14, 16, 18]


def test_amp_on_a_cpu_is_float32_bitwise(classification, tmp_path):
    """fairseq's autocast is CUDA's; nothing is to be rounded where nothing is cast."""
    ends = []
    for more in ([], ["--amp"]):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam", *more)
        trainer = tiny.build_trainer(argv)
        assert sharpness_aware(trainer.optimizer).core.half_dtype is None
        for sample in tiny.batches(trainer):
            trainer.train_step([sample])
        ends.append(tiny.weights(trainer))
    assert equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_cast_leaves_the_ascent_alone(classification, tmp_path, dtype):
    """What --amp does on a GPU, with the precision of its autocast said by hand."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", "--lr", "0")
    trainer = tiny.build_trainer(argv)
    sam = sharpness_aware(trainer.optimizer)
    sam.core.compute_in(dtype)
    before, seen = tiny.weights(trainer), []
    trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(tiny.weights(trainer)))
    trainer.train_step(tiny.batches(trainer)[:1])
    moved = torch.cat([w[w != b] for w, b in zip(seen[-1], before)])
    assert len(moved) > 1000 and moved.dtype == torch.float32
    assert torch.equal(moved.to(dtype).float(), moved)
    assert equal(tiny.weights(trainer), before)


in_all_gpu_modes = pytest.mark.parametrize("options", list(MODES.values()), ids=list(MODES))


def build_on_a_gpu(data, tmp_path, optimizer, options):
    return gpu.build_trainer(data, tmp_path, optimizer, "--dropout", "0.1", *options)


@pytest.mark.cuda
@in_all_gpu_modes
@everywhere
def test_trains_on_a_gpu(classification, tmp_path, optimizer, options):
    trainer = build_on_a_gpu(classification, tmp_path, optimizer, options)
    before = tiny.weights(trainer)
    logs = [trainer.train_step([sample]) for sample in tiny.batches(trainer)]
    assert all(torch.isfinite(torch.as_tensor(log["loss"])) for log in logs)
    assert not equal(tiny.weights(trainer), before)


@pytest.mark.cuda
@in_all_gpu_modes
@everywhere
def test_resumed_on_a_gpu_is_uninterrupted_bitwise(classification, tmp_path, optimizer, options):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        make = functools.partial(build_on_a_gpu, classification, tmp_path, optimizer, options)
        assert_resumes(make, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The small RoBERTa in float64 and in each precision, with two batches of 32 sentences."""
    from scripts.benchmark import half_precision

    argv = tiny.arguments(
        REGRESSION / "data",
        tmp_path_factory.mktemp("half"),
        *json.loads((REGRESSION / "architecture.json").read_text()),
        *("--finetune-from-model", str(REGRESSION / "small_roberta.pt"), "--lr", "1e-3"),
    )
    trainer = tiny.build_trainer(argv)
    checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    for sample in tiny.batches(trainer)[:6]:  # a head that is not random
        trainer.train_step([sample])
    model = trainer.get_model().eval()

    def pair(sample, precision):
        with_criterion = (model, trainer.get_criterion(), sample)
        exact = half_precision.Model(*with_criterion, torch.float64, torch.float64)
        return exact, half_precision.Model(*with_criterion, *precision)

    return {
        name: [pair(sample, precision) for sample in tiny.batches(trainer, 32)[:2]]
        for name, precision in half_precision.PRECISIONS.items()
    }


@pytest.fixture(scope="module")
def measured(pairs):
    """The script's measurements, by dtype, at three rho."""
    from scripts.benchmark.half_precision import measure

    return [
        measure(each, name, rho, draws=2, roundings=10)
        for name, each in pairs.items()
        for rho in (0.01, 0.02, 0.05)
    ]


def test_weights_of_sentences_are_those_of_float64(measured):
    """Total variation between g and the float64 g, and that the literal probe is far from it."""
    bound = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.08, "amp": 0.05}
    for row in measured:
        assert row.tv_worst < bound[row.dtype], row
        if row.dtype != "fp32":
            assert row.tv_literal > 2 * row.tv_rule, row


def test_rise_of_the_loss_is_that_of_the_exact_ascent(measured):
    """Within 3 %, averaged over the draws of the rounding, of which one scatters by up to 4 %."""
    for row in measured:
        assert row.rise_stochastic == pytest.approx(1, abs=0.03), row
        assert row.realised == pytest.approx(1, abs=0.03), row


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_other_estimates_of_guardedness(pairs, dtype):
    """The central difference of the script is the plugin's; a forward difference is further off."""
    from scripts.benchmark.half_precision import total_variation
    from scripts.benchmark.probe_estimators import ESTIMATORS, sides

    found = {kind: [] for kind in ESTIMATORS}
    for exact, model in pairs[dtype]:
        before = [p.data.clone() for p in model.params]
        a, radius = model.guardedness(0.05, None, draw=0)
        draws = [sides(model, radius, draw) for draw in range(2)]
        assert equal([p.data for p in model.params], before)
        torch.testing.assert_close((draws[0].ahead - draws[0].behind) / 2, a)
        for draw in range(2):
            exact_a = exact.exact_guardedness(0.05, draw)
            for kind, estimate in ESTIMATORS.items():
                found[kind].append(
                    total_variation(estimate(draws[draw], [draws[1 - draw]]), exact_a)
                )
    means = {kind: sum(tv) / len(tv) for kind, tv in found.items()}
    for kind, mean in means.items():
        if kind.startswith("forward"):
            assert mean > 1.5 * means["central difference"], means
