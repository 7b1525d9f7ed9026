"""The ascent over lists of tensors on a GPU: in a few kernels, equal to a tensor at a time."""

import torch

from deltasam_fairseq.algorithms import sam_ascent_
from tests.helpers import gpu


def test_is_the_ascent_of_a_cpu_and_starts_few_kernels():
    generator = torch.Generator().manual_seed(1)
    weights, grads = ([torch.randn(50, 30, generator=generator) for _ in range(200)] for _ in "wg")
    expected = [torch.empty_like(w) for w in weights]
    norm = sam_ascent_(expected, weights, grads, 0.5).norm

    weights, grads = ([t.to(gpu.DEVICE) for t in some] for some in (weights, grads))
    out = [torch.empty_like(w) for w in weights]
    sam_ascent_(out, weights, grads, 0.5)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = sam_ascent_(out, weights, grads, 0.5)
        torch.cuda.synchronize()
    torch.testing.assert_close(found.norm.cpu(), norm, rtol=1e-6, atol=0)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
    assert len(profile.events()) < 100  # 200 tensors, three operations each
