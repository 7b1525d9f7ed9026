"""Adam's step over lists of tensors is fairseq's."""

import pytest
import torch
from fairseq.optim.adam import Adam

from deltasam_fairseq.optim import adam
from deltasam_fairseq.optim.adam import FusedAdam, MultiTensorAdam
from tests.helpers import tiny

SHAPES = [(3,), (2, 5), (), (7, 1)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def fused_here(device):
    try:
        adam._require_fused(torch.device(device))
    except ValueError:
        return False
    return True


def run(optimizer_class, device, steps=12, dtype=torch.float32, **options):
    """Weights after some steps on the same gradients; the second weight joins in at the third."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(s, generator=generator) for s in SHAPES]
    params = [torch.nn.Parameter(w.to(device, dtype)) for w in start]
    optimizer = optimizer_class(params, **OPTIONS, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator) * 10.0 ** (i - 2)
            p.grad = None if i == 1 and step < 2 else g.to(device, dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("device", DEVICES)
def test_foreach_is_fairseqs_step(device, monkeypatch):
    """On a CPU bit for bit, in chunks of any size."""
    for chunk in (1, 4, 1 << 25):
        monkeypatch.setattr(adam, "CHUNK", chunk)
        for a, b in zip(run(Adam, device)[0], run(MultiTensorAdam, device)[0]):
            exact = {"rtol": 0, "atol": 0} if device == "cpu" else {}
            torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_is_fairseqs_step_to_rounding(device):
    """Also with an eps that matters, which torch adds after the correction of the bias."""
    if not fused_here(device):
        pytest.skip(f"torch {torch.__version__} has no fused Adam for {device}")
    found = run(FusedAdam, device)[0]
    for a, b in zip(run(Adam, device)[0], found):
        torch.testing.assert_close(a, b)
    OPTIONS_WITH_LARGE_EPS = {**OPTIONS, "eps": 0.5}
    p, q = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    loop = Adam([p], **OPTIONS_WITH_LARGE_EPS)
    fused = FusedAdam([q], **OPTIONS_WITH_LARGE_EPS)
    for _ in range(3):
        p.grad, q.grad = (torch.tensor([1.0, -2.0, 0.1], device=device) for _ in range(2))
        loop.step()
        fused.step()
    torch.testing.assert_close(p, q)
    # One step from 1 with g = 1: sqrt(v) = sqrt(0.02), m = 0.1, bias corrections 0.1 and 0.02.
    q = torch.nn.Parameter(torch.ones((), device=device))
    q.grad = torch.ones((), device=device)
    FusedAdam([q], **OPTIONS_WITH_LARGE_EPS).step()
    by_hand = 1 - 0.01 * 0.1 - 0.01 * 0.02**0.5 / 0.1 * 0.1 / (0.02**0.5 + 0.5)
    assert q.item() == pytest.approx(by_hand, rel=1e-6)


def test_states_are_exchanged_with_fairseqs():
    _, loop = run(Adam, "cpu")
    params, foreach = run(MultiTensorAdam, "cpu", steps=3)
    foreach.load_state_dict(loop.state_dict())
    assert foreach.state[params[0]]["step"] == 12 and foreach.state[params[1]]["step"] == 10
    Adam(params, **OPTIONS).load_state_dict(foreach.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_take_fairseqs_loop(dtype):
    for a, b in zip(
        run(Adam, "cpu", dtype=dtype)[0],
        run(MultiTensorAdam, "cpu", dtype=dtype)[0],
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_option(optimizer, classification, tmp_path):
    """foreach trains as the loop bit for bit; auto on a CPU is the loop."""
    ends = {}
    for step in ("auto", "loop", "foreach", "fused"):
        if step == "fused" and not fused_here("cpu"):
            continue
        argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer)
        trainer = tiny.build_trainer([*argv, "--adam-step", step])
        assert isinstance(trainer.optimizer.optimizer, MultiTensorAdam) == (
            step in ("foreach", "fused")
        )
        for sample in tiny.batches(trainer)[:3]:
            trainer.train_step([sample])
        ends[step] = tiny.weights(trainer)
    for step, end in ends.items():
        exact = {} if step == "fused" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(end, ends["loop"], **exact)


def test_fused_where_there_is_none(monkeypatch):
    monkeypatch.delattr(torch, "_fused_adamw_", raising=False)
    with pytest.raises(ValueError, match="--adam-step fused.*use --adam-step foreach"):
        FusedAdam([torch.nn.Parameter(torch.ones(2))], **OPTIONS)


@pytest.mark.parametrize("step", ["loop", "foreach", "fused"])
def test_class_and_options_rebuild_the_optimizer(step, classification, tmp_path):
    """As fairseq's --zero-sharding os does."""
    if step == "fused" and not fused_here("cpu"):
        pytest.skip("no fused Adam")
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", "--adam-step", step)
    optimizer = tiny.build_trainer(argv).optimizer
    inner = optimizer.optimizer
    again = type(inner)(inner.param_groups, **optimizer.optimizer_config)
    assert repr(again) == repr(inner)
