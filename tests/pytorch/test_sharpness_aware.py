"""SharpnessAware in a plain loop, without fairseq."""

import copy
import functools
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from deltasam_fairseq.algorithms import draw_direction_, probe_generator, reference
from deltasam_fairseq.core import DeltaWeighting, Functional, Parts, Radius
from deltasam_fairseq.pytorch import SharpnessAware
from tests.pytorch import small

try:
    from torch.func import functional_call
except ImportError:  # torch < 2.0
    from torch.nn.utils.stateless import functional_call

RHO, BETA, ETA = 0.05, 3.0, 0.01
SHARE = 0.12  # 7 of 58 weights; the two logits' weights are alike, and both in or both out
scaling = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3: no GradScaler on a CPU"
)
each_method = pytest.mark.parametrize("method", small.PLAIN)
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}  # rounding, in another order of summation


def plain_gradients(model, closures):
    for p in model.parameters():
        p.grad = None
    torch.cat([closure() for closure in closures]).mean().backward()
    return small.gradients(model)


def losses_of(model):
    """The losses as a function of a flat float64 weight vector, and the vector."""
    names = [name for name, _ in model.named_parameters()]
    x, y = small.sentences(torch.float64)

    def losses(w):
        pieces = w.split([p.numel() for p in model.parameters()])
        own = {n: v.view_as(p) for n, v, p in zip(names, pieces, model.parameters())}
        return F.cross_entropy(functional_call(model, own, (x,)), y, reduction="none")

    return losses, parameters_to_vector(model.parameters()).detach()


def test_worked_by_hand():
    """l_j = x_j w, x = (1, 3), w = 2: eps = rho, the gradient is 2 wherever w is; l = (2, 6)."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    sam = SharpnessAware(model, "sam", rho=0.5)
    losses = sam.backward(lambda: model(torch.tensor([[1.0], [3.0]])).squeeze(1))
    assert losses.tolist() == [2.0, 6.0] and model.weight.grad.item() == 2.0
    assert model.weight.item() == 2.0
    figures = sam.figures()
    assert figures == {"loss": 4.0, "sam_loss": 5.0, "sharpness": 1.0, "ascent_gnorm": 2.0}


@pytest.mark.parametrize("sizes", [[6], [1, 3, 2]])
@each_method
def test_equals_the_reference(method, sizes):
    """In float64, one micro-batch or several of unequal size."""
    model = small.model(dropout=0.0, dtype=torch.float64)
    losses, w = losses_of(model)
    u = [torch.empty_like(p) for p in model.parameters()]
    draw_direction_(u, probe_generator(7, 0, torch.device("cpu")))
    u = torch.cat([v.flatten() for v in u])
    eps = {
        "sam": lambda: reference.sam_reference(losses, w, RHO),
        "asam": lambda: reference.asam_reference(losses, w, RHO, ETA),
        "rw_sam": lambda: reference.rw_sam_reference(losses, w, u.sign(), RHO, 2.0),
        "gsam": lambda: reference.sam_reference(losses, w, RHO),
        "fsam": lambda: fsam_eps(losses, w),
        "delta_sam": lambda: reference.delta_sam_reference(losses, w, u, RHO, BETA).eps,
    }[method]()
    uniform = torch.full((small.N,), 1 / small.N, dtype=torch.float64)
    expected = reference.gradient(losses, w + eps, uniform)
    if method == "gsam":
        expected = reference.gsam_reference(losses, w, RHO, 0.4)
    more = {"share": SHARE} if method == "fsam" else {}
    sam = SharpnessAware(model, method, RHO, seed=7, **more)
    clean = sam.backward(small.closures(model, *sizes, dtype=torch.float64))
    torch.testing.assert_close(small.gradients(model), expected, **FLOAT64)
    torch.testing.assert_close(clean, losses(w))


def fsam_eps(losses, w):
    g = reference.gradient(losses, w, torch.full((small.N,), 1 / small.N, dtype=w.dtype))
    return reference.perturbation(g * reference.fisher_reference(losses, w, SHARE), RHO)


@pytest.mark.parametrize("sizes", [[6], [1, 3, 2]])
def test_functional_equals_the_reference(sizes):
    model = small.model(dropout=0.0, dtype=torch.float64)
    x, y = small.sentences(torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def outputs(w):
        pieces = w.split([p.numel() for p in model.parameters()])
        own = {n: v.view_as(p) for n, v, p in zip(names, pieces, model.parameters())}
        return functional_call(model, own, (x,))

    w = losses_of(model)[1]
    expected = reference.functional_reference(outputs, lambda z: F.cross_entropy(z, y), w, RHO)
    closures = small.closures(model, *sizes, dtype=torch.float64, outputs=True)
    SharpnessAware(model, "functional", RHO).backward(closures)
    torch.testing.assert_close(small.gradients(model), expected, **FLOAT64)
    with pytest.raises(ValueError, match="no outputs"):
        SharpnessAware(model, "functional").backward(small.closures(model, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[6], [1, 3, 2]])
def test_functional_with_weights_of_the_sentences(sizes):
    """``J_z(w + eps)^T dL/dz(w)``, eps that of delta-SAM."""
    model = small.model(dropout=0.0, dtype=torch.float64)
    losses, w = losses_of(model)
    u = [torch.empty_like(p) for p in model.parameters()]
    draw_direction_(u, probe_generator(0, 0, torch.device("cpu")))
    u = torch.cat([v.flatten() for v in u])
    eps = reference.delta_sam_reference(losses, w, u, RHO, BETA).eps
    x, y = small.sentences(torch.float64)
    z = model(x)
    (delta,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    closures = small.closures(model, *sizes, dtype=torch.float64, outputs=True)
    parts = Parts(Radius(RHO), DeltaWeighting(BETA), descent=Functional())
    SharpnessAware(model, parts).backward(closures)
    found = small.gradients(model)
    vector_to_parameters(w + eps, model.parameters())
    expected = torch.autograd.grad((model(x) * delta).sum(), list(model.parameters()))
    torch.testing.assert_close(found, parameters_to_vector(expected), **FLOAT64)


@pytest.mark.parametrize("sizes", [[6], [2, 4]])
def test_trust_region(sizes):
    """eps = d w^2 g / ||w g||; d grows with the square of the noise, and needs embeddings."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = torch.arange(18).view(6, 3) % 9, torch.tensor([0, 1] * 3)

    def losses(a, b):
        z = model(a)
        return F.cross_entropy(z, b, reduction="none"), z

    parts = list(zip(x.split(sizes), y.split(sizes)))
    closures = [lambda part=part: losses(*part) for part in parts]
    radii, before = [], small.weights(model)
    for sigma in (1e-3, 2e-3):
        seen = []
        sam, hook = SharpnessAware(model, "tram", sigma=sigma), None
        hook = model.register_forward_pre_hook(lambda *_, to=seen: to.append(small.weights(model)))
        sam.backward(closures)
        hook.remove()
        radii.append(sam.figures()["sam_rho"])
    assert radii[0] > 0 and radii[1] / radii[0] == pytest.approx(4, rel=0.01)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    g = [p.grad for p in model.parameters()]
    norm = torch.cat([(w * d).flatten() for w, d in zip(before, g)]).norm()
    expected = [w + radii[1] * w**2 * d / norm for w, d in zip(before, g)]
    torch.testing.assert_close(seen[-1], expected, **FLOAT64)
    assert all(map(torch.equal, small.weights(model), before))
    without = small.model()
    with pytest.raises(ValueError, match="the model has none"):
        SharpnessAware(without, "tram").backward(small.closures(without, outputs=True))


def test_a_backward_for_each_group_is_m_sharpness():
    """Groups of 4 and 2 sentences: each has its own eps, the gradient is that of the mean."""
    model = small.model(dropout=0.0, dtype=torch.float64)
    losses, w = losses_of(model)
    sam = SharpnessAware(model, "sam", RHO)
    for closure, n in zip(small.closures(model, 4, 2, dtype=torch.float64), (4, 2)):
        sam.backward(closure, scale=n / small.N)
    expected = reference.m_sharpness_reference(losses, w, RHO, 4)
    torch.testing.assert_close(small.gradients(model), expected, **FLOAT64)


@each_method
def test_weights_are_back_and_masks_are_the_same(method):
    """The losses are those of a plain forward from the same random state, which goes on alike."""
    model = small.model()
    (closure,) = small.closures(model)
    before = small.weights(model)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected, after = closure().detach(), [torch.rand(1), random.random(), np.random.rand()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    found = SharpnessAware(model, method).backward(closure)
    assert torch.equal(found, expected)
    assert [torch.rand(1), random.random(), np.random.rand()] == after
    assert all(map(torch.equal, small.weights(model), before))


def test_pythons_and_numpys_numbers_are_the_same():
    model = small.model()
    x, y = small.sentences()
    seen = []

    def closure():
        seen.append((random.random(), np.random.rand()))
        return F.cross_entropy(model(x * seen[-1][0]), y, reduction="none")

    SharpnessAware(model).backward(closure)
    assert len(set(seen)) == 1


@each_method
@pytest.mark.parametrize("sizes", [[6], [2, 4]])
def test_rho_0_is_the_plain_gradient(method, sizes):
    model = small.model(dropout=0.0)
    closures = small.closures(model, *sizes)
    expected = plain_gradients(model, small.closures(model))
    model.zero_grad()
    SharpnessAware(model, method, rho=0.0).backward(closures)
    torch.testing.assert_close(small.gradients(model), expected)
    if len(sizes) == 1:
        assert torch.equal(small.gradients(model), expected)


def test_strength_0_is_sam():
    ends = []
    for method, more in (
        ("sam", {}),
        ("delta_sam", {"beta": 0.0}),
        ("rw_sam", {"lambda_": 0.0}),
        ("gsam", {"alpha": 0.0}),
    ):
        model = small.model()
        torch.manual_seed(3)
        SharpnessAware(model, method, **more).backward(small.closures(model))
        ends.append(small.gradients(model))
    assert all(torch.equal(ends[0], end) for end in ends)


def test_accumulates_and_scales():
    """Twice backward is twice the gradient, a sum is N times the mean, scale multiplies."""
    model = small.model(dropout=0.0, dtype=torch.float64)
    closures = small.closures(model, dtype=torch.float64)
    SharpnessAware(model, "sam").backward(closures)
    mean = small.gradients(model)
    SharpnessAware(model, "sam").backward(closures)
    torch.testing.assert_close(small.gradients(model), 2 * mean)
    for more, scale, expected in (({"reduction": "sum"}, 1.0, 6 * mean), ({}, 0.25, mean / 4)):
        model.zero_grad()
        SharpnessAware(model, "sam", **more).backward(closures, scale=scale)
        torch.testing.assert_close(small.gradients(model), expected)


@scaling
@each_method
def test_grad_scaler_clipping_and_scheduler(method):
    """Steps with a GradScaler are those without: unscale_ once, by the loop itself."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = small.model(dtype=torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        sam = SharpnessAware(model, method)
        torch.manual_seed(3)
        for _ in range(3):
            sam.backward(small.closures(model, 2, 4, dtype=torch.float64), scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step() if scaler is None else scaler.step(optimizer)
            optimizer.zero_grad()
            scheduler.step()
            if scaler is not None:
                scaler.update()
        assert scheduler.get_last_lr() == [0.1 / 4]
        ends.append(parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*ends, **FLOAT64)


@scaling
def test_overflow_is_skipped_by_the_scaler():
    """An infinite gradient at w: NaN at w + eps*, found by the scaler; the weights stay."""
    model = small.model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = small.weights(model)
    (closure,) = small.closures(model)
    SharpnessAware(model, "sam").backward(lambda: 1e4 * closure(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, small.weights(model), before))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("outside", [False, True])
@each_method
def test_autocast(method, outside):
    """The closure's own autocast or one around all: the casts see the perturbed weights."""
    model = small.model(dropout=0.0)
    (plain,) = small.closures(model)
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))

    def closure():
        with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
            return plain()

    sam = SharpnessAware(model, method, rho=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        sam.backward(plain if outside else closure)
    assert seen[-1].dtype == torch.bfloat16 and not torch.equal(seen[-1], seen[0])
    found = sam.figures()
    assert found["sharpness"] > 0.05 and abs(found["sam_realised"] - 1) < 0.2


@pytest.mark.parametrize("method", small.PLAIN)
def test_one_autocast_around_all(method):
    """With checkpointing as without, and a forward that follows sees w."""
    gradients = []
    for checkpointed in (False, True):
        model = small.model(dropout=0.0)
        x, y = small.sentences()
        again = functools.partial(checkpoint, model, use_reentrant=False)
        forward = again if checkpointed else model
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            SharpnessAware(model, method, rho=1.0).backward(
                lambda: F.cross_entropy(forward(x).float(), y, reduction="none")  # noqa: B023
            )
            assert torch.equal(model(x), expected)
        gradients.append(small.gradients(model))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_one_autocast_around_two_steps():
    model = small.model(dropout=0.0)
    x, _ = small.sentences()
    sam, seen = SharpnessAware(model, "sam", rho=1.0), []
    with torch.autocast("cpu", torch.bfloat16):
        for move in (sam.first_step, sam.second_step, lambda: None):
            seen.append(model(x).float())
            seen[-1].sum().backward()
            move()
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_half_precision_weights_move(method, dtype):
    """rho / sqrt(d) is far below a unit in the last place; rounding to nearest leaves nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 2)).to(dtype)
    x, y = torch.randn(8, 64).to(dtype), torch.tensor([0, 1] * 4)
    sam = SharpnessAware(model, method, rho=0.01 if method != "asam" else 0.1)
    before, eps = small.weights(model), []

    def closure():
        eps.append([p.detach().float() - b.float() for p, b in zip(model.parameters(), before)])
        return F.cross_entropy(model(x).float(), y, reduction="none")

    sam.backward(closure)
    assert abs(sam.figures()["sam_realised"] - 1) < 0.2
    assert any(e.abs().sum() > 0 for e in eps[-1])
    assert all(map(torch.equal, small.weights(model), before))


@each_method
def test_frozen_weights_stay_and_get_no_gradient(method):
    model = small.model()
    for p in model[0].parameters():
        p.requires_grad_(False)
    pointers, seen = [p.data_ptr() for p in model[0].parameters()], []
    model.register_forward_pre_hook(
        lambda *_: seen.append([p.data_ptr() for p in model[0].parameters()])
    )
    SharpnessAware(model, method).backward(small.closures(model))
    assert all(each == pointers for each in seen)
    assert model[0].weight.grad is None and model[3].weight.grad is not None


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=2)
    model = peft.get_peft_model(small.model(), config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sam, moved = SharpnessAware(model, "delta_sam"), set()

    def note(*_):
        own = model.named_parameters()
        moved.update(n for n, p in own if not torch.equal(p, before[n]))

    model.register_forward_pre_hook(note)
    sam.backward(small.closures(model))
    assert len(trained) == 2 and moved == set(trained)


def test_lora_on_a_base_in_bf16():
    """The losses are as coarse as the base: the probe is a large one, as with all in bf16."""
    weights = []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        base, head = nn.Linear(4, 64), nn.Linear(64, 2)
        model = nn.ModuleDict({"base": base, "down": nn.Linear(4, 4), "up": nn.Linear(4, 64)})
        for frozen in (base, head):
            frozen.to(dtype).requires_grad_(False)
        x, y = small.sentences()
        model["head"] = head

        def losses(model=model, dtype=dtype, x=x, y=y):
            added = model["up"](model["down"](x))
            hidden = model["base"](x.to(dtype)) + added.to(dtype)
            logits = model["head"](hidden.tanh()).to(torch.promote_types(dtype, torch.float32))
            return F.cross_entropy(logits, y, reduction="none")

        sam = SharpnessAware(model, "delta_sam", rho=1e-3)
        sam.backward(losses)
        weights.append(sam._last.figures.reweighting.weights)
        assert "sam_realised" not in sam.figures()  # the weights that move are in float32
    # The probe of 1e-3 would be 3.6 off.
    torch.testing.assert_close(*weights, rtol=0, atol=0.4)


def test_degenerate_cases_are_sam():
    """One sentence; losses that do not depend on the probe; never a NaN."""
    for case in ("one", "equal"):
        ends = []
        for method in ("sam", "delta_sam"):
            model = small.model(dropout=0.0)
            x, y = small.sentences()
            rows = slice(0, 1) if case == "one" else slice(None)
            closure = lambda: F.cross_entropy(model(x[rows]), y[rows], reduction="none")  # noqa
            if case == "equal":  # the probe leaves no trace in the losses
                closure = lambda: model(x).sum(1) - model(x).sum(1).detach()  # noqa
            sam = SharpnessAware(model, method)
            sam.backward(closure)
            ends.append(small.gradients(model))
        assert sam.figures()["delta_sam_uniform"] == 1.0
        assert torch.equal(*ends) and torch.isfinite(ends[0]).all()


def test_a_zero_gradient_perturbs_nothing():
    model = small.model(dropout=0.0)
    SharpnessAware(model, "sam").backward(lambda: 0 * model(small.sentences()[0]).sum(1))
    assert (small.gradients(model) == 0).all()


@pytest.mark.parametrize("method", [*small.PLAIN, "tram_theta"])
def test_resumes_bit_for_bit(method):
    """From the state after two of four updates, with the model, optimizer and generators."""

    def run(model, sam, optimizer, updates):
        for _ in range(updates):
            outputs = method == "tram_theta"
            sam.backward(small.closures(model, dtype=torch.bfloat16, outputs=outputs))
            figures.append(sam.figures())
            optimizer.step()
            optimizer.zero_grad()

    def new():
        model = small.model(dtype=torch.bfloat16)
        return model, SharpnessAware(model, method), torch.optim.SGD(model.parameters(), lr=0.1)

    figures = []
    model, sam, optimizer = new()
    torch.manual_seed(3)
    run(model, sam, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), sam.state_dict(), torch.get_rng_state()))
    run(model, sam, optimizer, 2)
    other, resumed, other_optimizer = new()
    other.load_state_dict(saved[0]), resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    run(other, resumed, other_optimizer, 2)
    assert all(map(torch.equal, small.weights(other), small.weights(model)))
    assert figures[2:4] == figures[4:]


def tram_theta(model, state=None):
    """Accumulate two gradients and step; return the radii of both, and the method."""
    sam = SharpnessAware(model, "tram_theta")
    if state is not None:
        sam.load_state_dict(state)
    radii = []
    for _ in range(2):
        sam.backward(small.closures(model, outputs=True))
        radii.append(sam.figures()["sam_rho"])
    torch.optim.SGD(sam.parameters(), lr=1.0).step()
    return radii, sam


def test_tram_theta_compares_with_the_weights_before_the_last_step():
    """However many calls of backward a step has; its radius is 0 before the first."""
    model = small.model(dropout=0.0)
    radii, sam = tram_theta(model)
    assert radii == [0, 0]
    radii, _ = tram_theta(model, sam.state_dict())
    assert radii[0] == radii[1] > 0


def test_a_state_of_tram_theta_stays_as_it_was_saved():
    model = small.model()
    _, sam = tram_theta(model)
    saved = sam.state_dict()
    before = copy.deepcopy(saved["radius"])
    for state in (saved, saved):
        _, sam = tram_theta(model, state)
        sam.backward(small.closures(model, outputs=True))
    for key, weights in before.items():
        torch.testing.assert_close(dict(saved["radius"][key]), dict(weights), rtol=0, atol=0)


def test_tram_theta_knows_other_weights_of_the_same_shapes():
    """Resumed with another layer frozen: there are no weights to compare with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(small.WIDTH, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    _, sam = tram_theta(model)
    model.requires_grad_(True)
    model[1].requires_grad_(False)
    assert tram_theta(model, sam.state_dict())[0] == [0, 0]


def test_tram_theta_puts_the_weights_back_after_an_error():
    """Itself, in whatever loop: in these the loop would too."""
    model = small.model()
    _, sam = tram_theta(model)
    sam.backward(small.closures(model, outputs=True))
    before, seen, perturber = small.weights(model), [], sam._perturber

    def replay():
        seen.extend(small.weights(model))
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        perturber.parts.radius.in_force(3, types.SimpleNamespace(replay=replay), perturber)
    assert not any(map(torch.equal, seen, before))
    assert all(map(torch.equal, small.weights(model), before))


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_two_steps_equal_one_backward(method):
    """first_step and second_step on one full batch without dropout."""
    ends = []
    for steps in (1, 2):
        model = small.model(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam, (closure,) = SharpnessAware(model, method), small.closures(model)
        if steps == 1:
            sam.backward(closure)
            optimizer.step()
        else:
            closure().mean().backward()
            sam.first_step(zero_grad=True)
            closure().mean().backward()
            sam.second_step(optimizer, zero_grad=True)
            assert model[0].weight.grad is None
            sam.first_step()
            with pytest.raises(ValueError, match=r"second_step\(optimizer, zero_grad=True\)"):
                sam.second_step(zero_grad=True)
        ends.append(parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*ends)
    for other in ("delta_sam", "gsam", "fsam", "tram"):
        with pytest.raises(ValueError, match="sam, asam"):
            SharpnessAware(model, other).first_step()


@pytest.mark.parametrize("moment", range(2, 5))
def test_an_error_in_a_closure_leaves_weights_and_gradients(moment):
    """In the clean forward, at the probe, in the descent."""
    model, calls = small.model(), []
    (closure,) = small.closures(model)

    def failing():
        calls.append(1)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return closure()

    before, gradient = small.weights(model), torch.ones_like(model[0].weight)
    model[0].weight.grad = gradient
    with pytest.raises(KeyboardInterrupt):
        SharpnessAware(model).backward(failing)
    assert all(map(torch.equal, small.weights(model), before))
    assert model[0].weight.grad is gradient and (gradient == 1).all()
    assert model[3].weight.grad is None


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"method": "sgd"}, "method 'sgd'; allowed: .*'delta_sam'"),
        ({"rho": -1.0}, "rho -1.0"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"eta": -1.0}, "eta -1.0"),
        ({"method": "gsam", "alpha": -1.0}, "alpha -1.0"),
        ({"method": "rw_sam", "lambda_": -1.0}, "lambda_ -1.0"),
        ({"method": "fsam", "share": 0.0}, "share 0.0"),
        ({"method": "fsam", "every": 0}, "every 0"),
        ({"method": "tram", "sigma": 0.0}, "sigma 0.0"),
        ({"method": "sam", "beta": 3.0}, "beta 3.0; allowed: with method 'sam' only"),
        ({"probe_radius": 0.0}, "probe_radius 0.0; allowed: above 0"),
        ({"reduction": "max"}, "reduction 'max'"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        SharpnessAware(small.model(), **arguments)


def test_closures_that_cannot_be_used():
    model = small.model()
    (closure,) = small.closures(model)
    sam, own = SharpnessAware(model), torch.Generator().manual_seed(0)
    for losses, match in (
        (lambda: closure().mean(), r"of shape \(\); return one loss a sentence"),
        (lambda: closure().half(), "in torch.float16, too coarse"),
        (lambda: (closure(), 1, 2), "tuple"),
        (lambda: closure() + torch.rand(1, generator=own), "two calls of a closure"),
    ):
        with pytest.raises(ValueError, match=match):
            sam.backward(losses)
    with pytest.raises(ValueError, match="closures"):
        sam.backward([])
    with pytest.raises(ValueError, match="first micro-batch 'without sentences'"):
        sam.backward(lambda: closure()[:0])
    for method in ("sam", "delta_sam"):
        sam = SharpnessAware(model, method)
        sam.backward(closure)
        with pytest.raises(ValueError, match="closures 'without sentences'"):
            sam.backward(lambda: closure()[:0])
    with pytest.raises(ValueError, match="without"):
        sam.load_state_dict({})
    state = sam.state_dict()
    del state["radius"]
    sam.load_state_dict(state)


def test_buffers_are_updated_once():
    """BatchNorm's statistics see one forward an update, as without SAM."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    SharpnessAware(model).backward(small.closures(model))
    assert model[1].num_batches_tracked == 1
