"""The compiled rounding computes what torch's operations compute, or it is not used."""

import logging
import shutil

import pytest
import torch

from deltasam_fairseq.algorithms import OPERATIONS, StochasticRounding, move_along_
from deltasam_fairseq.core import compiled_rounding
from deltasam_fairseq.core.compiled_rounding import rounding_kernels
from tests.helpers.gpu import WITHOUT_COMPILER


@pytest.fixture(autouse=True)
def forgotten():
    compiled_rounding._compile_and_check.cache_clear()
    yield
    compiled_rounding._compile_and_check.cache_clear()


def test_a_cpu_takes_torchs_operations():
    assert rounding_kernels(torch.float16, torch.ones(1), torch.float16) is OPERATIONS


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.parametrize(
    "dtype, kept_in", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_compiled_is_the_same(dtype, kept_in, caplog):
    """By the compiler's back end for CPUs."""
    assert_the_same(dtype, kept_in, torch.device("cpu"), caplog)


@pytest.mark.cuda
@pytest.mark.skipif(WITHOUT_COMPILER is not None, reason=str(WITHOUT_COMPILER))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
def test_compiled_on_a_gpu_is_the_same(dtype, masters, caplog):
    kept_in = torch.float32 if masters else dtype
    assert_the_same(dtype, kept_in, torch.device("cuda", 0), caplog)


def assert_the_same(dtype, kept_in, device, caplog):
    """The weights to the last bit but for one in a thousand, the share that is realised, an
    ascent that is not finite."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape, scale, dtype):
        return torch.randn(shape, generator=generator, device=device).mul(scale).to(dtype)

    shapes = [(600, 500), (7,), (30, 40), ()]
    weights = [drawn(s, 0.02, kept_in) for s in shapes]
    grads = [drawn(s, 1, dtype) for s in shapes]
    grads[0][:200] = 0
    threads = torch._inductor.config.compile_threads
    with caplog.at_level(logging.INFO):
        compiled = rounding_kernels(dtype, weights[0], dtype, compiled=True)
    assert compiled is not OPERATIONS and "is compiled" in caplog.text
    assert torch._inductor.config.compile_threads == threads  # of the user's own compiling
    results, shares = [], []
    scale = torch.tensor(1e-5, device=device)
    for kernels in (OPERATIONS, compiled):
        out = [w.to(dtype, copy=True) for w in weights]
        to = StochasticRounding(dtype, generator.manual_seed(5), kernels)
        shares.append(move_along_(out, weights, grads, scale, to).item())
        results.append(torch.cat([v.flatten() for v in out]))
    assert (results[0] != results[1]).double().mean() < 1e-3
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)
    to = StochasticRounding(dtype, generator, compiled)
    move_along_(out, weights, grads, scale * float("nan"), to)
    assert all(v.isnan().all() for v in out)


class Wrapped(RuntimeError):
    """As the compiler reports what its back end met."""

    def __init__(self):
        super().__init__("backend='inductor' raised:")
        self.inner_exception = RuntimeError("no compiler here\nand a long explanation")


def refuse(*args, **kwargs):
    raise Wrapped


def something_else(kernel, **options):
    """A compiler that forgets what is below the last place."""
    if kernel is OPERATIONS.realised_along:
        return kernel
    return lambda w, d, scale, bits, dtype: kernel(w, d, scale, torch.zeros_like(bits), dtype)


@pytest.mark.parametrize(
    "compiler, message",
    [(refuse, "not compiled (no compiler here):"), (something_else, "differs when compiled:")],
)
def test_says_why_it_is_not_used(monkeypatch, caplog, compiler, message):
    monkeypatch.setattr(torch, "compile", compiler, raising=False)
    kernels = rounding_kernels(torch.bfloat16, torch.ones(1), torch.bfloat16, compiled=True)
    assert kernels is OPERATIONS
    assert message in caplog.text and "TORCH_COMPILE_DISABLE=1" in caplog.text


def test_goes_on_where_the_compiler_fails_later(monkeypatch, caplog):
    """At the 4th call, after the check: the operations take over, and say so once. Except for
    want of memory, which fairseq knows what to do with."""
    calls, errors = [], [RuntimeError("CUDA out of memory"), RuntimeError("no registers left")]

    def fails_later(kernel, **options):
        if kernel is OPERATIONS.realised_along:
            return kernel

        def compiled(*args):
            calls.append(1)
            if len(calls) > 2:
                raise errors[min(len(calls), 4) - 3]
            return kernel(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", fails_later, raising=False)
    kernels = rounding_kernels(torch.bfloat16, torch.ones(1), torch.bfloat16, compiled=True)
    assert len(calls) == 2 and kernels is not OPERATIONS
    w, bits = torch.ones(2000), torch.zeros(2000, dtype=torch.int16)
    args = (w, w, torch.ones(1), bits, torch.bfloat16)
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.round_moved(*args)
    for _ in range(3):
        assert torch.equal(kernels.round_moved(*args), OPERATIONS.round_moved(*args))
    assert len(calls) == 4 and caplog.text.count("compiled no longer (no registers left)") == 1
