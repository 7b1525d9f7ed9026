"""Stochastic rounding on a GPU: the compiled kernel, its fallback, its memory."""

import importlib

import pytest
import torch

from deltasam_fairseq.algorithms import (
    OPERATIONS,
    StochasticRounding,
    move_along_,
    random_bits,
    update_generator,
)
from deltasam_fairseq.algorithms.rounding import _AT_A_TIME
from deltasam_fairseq.core import compiled_rounding
from deltasam_fairseq.core.compiled_rounding import rounding_kernels
from tests.helpers import gpu, tiny

compiles = pytest.mark.skipif(gpu.WITHOUT_COMPILER is not None, reason=str(gpu.WITHOUT_COMPILER))

N = 3_000_001
LARGE = 64_000_000
BYTES_A_WEIGHT = 35  # of a piece, docs/benchmarks.md


@pytest.fixture
def compiled_again():
    """A kernel that is compiled inside the test, and forgotten after it."""
    compiled_rounding._compile_and_check.cache_clear()
    yield
    compiled_rounding._compile_and_check.cache_clear()


def settings():
    """What belongs to the user's process."""
    modules = ("torch._dynamo.config", "torch._inductor.config")
    configs = [importlib.import_module(name).get_config_copy() for name in modules]
    backends = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    return configs, backends


@compiles
@pytest.mark.parametrize(
    "dtype, kept_in",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp16", "memory-efficient-bf16"],
)
def test_one_kernel_is_the_operations(dtype, kept_in, compiled_again, caplog):
    """But for one weight in a thousand, which a fused multiplication and addition rounds apart."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(1)
    w = torch.randn(N, device=gpu.DEVICE, generator=generator).mul_(0.02).to(kept_in)
    d = torch.randn(N, device=gpu.DEVICE, generator=generator).to(dtype)
    bits, scale = random_bits(N, generator), torch.full((1,), 1e-5, device=gpu.DEVICE)
    before = settings()
    with torch.no_grad():
        kernels = rounding_kernels(dtype, w, dtype)
        assert kernels is not OPERATIONS, caplog.text
        results = [k.round_moved(w, d, scale, bits, dtype) for k in (OPERATIONS, kernels)]
    assert settings() == before
    differ = (results[0] != results[1]).double().mean().item()
    print(f"weights that differ, {dtype}: {differ:.1e}")
    assert differ < 1e-3
    assert (results[0] != w.to(dtype)).double().mean() > 0.01


def test_without_a_compiler_the_operations_are_taken(monkeypatch, compiled_again, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    w = torch.ones(2, device=gpu.DEVICE)
    assert rounding_kernels(torch.float16, w, torch.float16) is OPERATIONS
    assert "not compiled (no compiler here)" in caplog.text
    compiled_rounding._compile_and_check.cache_clear()
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    caplog.clear()
    assert rounding_kernels(torch.float16, w, torch.float16) is OPERATIONS and not caplog.text


@pytest.mark.parametrize("mode", ["fp16", "memory-efficient-bf16"])
def test_updates_without_a_compiler(classification, tmp_path, monkeypatch, mode):
    """Nothing but speed depends on the compiled kernel."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    options = gpu.MODES[mode]
    trainer = gpu.build_trainer(classification, tmp_path, "delta_sam_adam", *options)
    logs = [trainer.train_step([sample]) for sample in tiny.batches(trainer)[:2]]
    assert all(torch.isfinite(torch.as_tensor(log["loss"])) for log in logs)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiles)])
def test_memory_beside_the_weights(compiled):
    """What is computed in between is that of one piece, however large the weights are."""
    w = torch.randn(LARGE, device=gpu.DEVICE)
    d, out = torch.randn_like(w).half(), torch.empty_like(w, dtype=torch.float16)
    kernels = rounding_kernels(torch.float16, w, torch.float16, compiled=compiled)
    generator = update_generator(3, 0, 1, gpu.DEVICE)
    scale = torch.full((), 1e-3, device=gpu.DEVICE)

    @torch.no_grad()
    def move():
        to = StochasticRounding(torch.float16, generator, kernels)
        return move_along_([out], [w], [d], scale, to)

    move()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    move()
    beside = torch.cuda.max_memory_allocated() - held
    print(f"compiled {compiled}: {beside / 2**20:.0f} MiB beside {LARGE} weights")
    assert beside <= BYTES_A_WEIGHT * _AT_A_TIME["cuda"]
