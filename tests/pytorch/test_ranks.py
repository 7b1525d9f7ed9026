"""Two ranks in DistributedDataParallel against one process with the whole batch."""

import pytest
import torch

from tests.helpers import processes
from tests.pytorch import ranks, small


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("ranks"), processes.free_port()
    started = [
        processes.fork("tests.pytorch.ranks", [folder, port, rank], folder / f"{rank}.log")
        for rank in range(2)
    ]
    for rank, process in enumerate(started):
        process.join(100)
        assert process.exitcode == 0, (folder / f"{rank}.log").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("method", ranks.METHODS)
def test_equal_to_one_process(found, method, bucket_view):
    """In float64; both ranks have the same weights, bit for bit."""
    (weights, gradients, _), (others, _, _) = (each[method, bucket_view] for each in found)
    assert all(map(torch.equal, weights, others))
    expected = ranks.train(
        method, lambda m, outputs: small.closures(m, dtype=torch.float64, outputs=outputs)
    )
    torch.testing.assert_close((weights, gradients), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("method", ["gsam", "delta_sam"])
def test_no_sync(found, method, bucket_view):
    """The gradient of a call in no_sync is averaged too: it is that of the whole batch."""
    expected = ranks.accumulate(method, closures_of_all)
    for each in found:
        own = each["no_sync", method, bucket_view]
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def test_gsam_corrects_an_average_without_the_wrapper(found):
    expected = ranks.accumulate("gsam", closures_of_all)
    for each in found:
        torch.testing.assert_close(each["group"], expected, rtol=1e-9, atol=1e-12)


def closures_of_all(model, outputs):
    sizes = [size for each in ranks.SIZES for size in each]
    return small.closures(model, *sizes, dtype=torch.float64, outputs=outputs)


def test_other_numbers_of_micro_batches_are_refused(found):
    """On both ranks, in the first update, where they would wait for each other."""
    for rank, each in enumerate(found):
        assert f"{2 - rank} micro-batches here" in each["error"], each["error"]


def test_what_is_reduced(found):
    """The ascent's gradients once, and four numbers for delta-SAM or one for SAM.

    DistributedDataParallel reduces the descent's by itself.
    """
    d = sum(p.numel() for p in small.model().parameters())
    assert found[0]["delta_sam", False][2] == [(torch.float64, 4), (torch.float64, d)]
    assert found[0]["sam", False][2] == [(torch.float64, d), (torch.float64, 1)]
