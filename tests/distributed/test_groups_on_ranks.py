"""m-sharpness on several ranks, float64, against one process with one batch.

Real processes, gloo over TCP. Bounds are those of test_equivalence: the order of summation.
"""

import itertools

import pytest
import torch

from tests.distributed.test_equivalence import BACKENDS, BATCHES, BOUND
from tests.helpers import tiny
from tests.helpers.processes import run_ranks

# Number of ranks, and sentences of every mini-batch in the global order; 0 is one that is missing.
LAYOUTS = {
    "large batch": (1, [16]),
    "2 x 2": (2, [4, 4, 4, 4]),
    "uneven": (2, [7, 1, 6, 2]),
    "rank ends with a dummy": (2, [7, 6, 3, 0]),
    "rank without sentences": (3, [9, 7, 0]),
}
MICRO = [3, 4]


def updates(ranks, sizes):
    """Sentence numbers: mini-batch k goes to rank k mod R, as fairseq's."""

    def cut(batch):
        sentences = iter(batch)
        parts = [list(itertools.islice(sentences, n)) for n in sizes]
        return [parts[rank::ranks] for rank in range(ranks)]

    return [cut(batch) for batch in BATCHES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    data = tiny.write_classification(folder / "data", longest=50)
    runs = {}
    for (layout, split), m, backend in itertools.product(LAYOUTS.items(), MICRO, BACKENDS):
        if split[0] == 1 and backend != BACKENDS[0]:
            continue
        argv = tiny.arguments(
            *(data, folder, "--optimizer", "sam_adam", "--sam-micro", str(m)),
            *("--dropout", "0", "--attention-dropout", "0", "--find-unused-parameters"),
            *("--no-save", "--bucket-cap-mb", "1", "--ddp-backend", backend),
            *("--criterion", "float64_sentence_prediction"),
        )
        runs[f"{m}, {layout}, {backend}"] = {
            "argv": argv,
            "updates": updates(*split),
            "dtype": "float64",
        }
    return run_ranks(folder, runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [name for name, split in LAYOUTS.items() if split[0] > 1])
@pytest.mark.parametrize("m", MICRO)
def test_equals_one_process_with_one_batch(results, m, layout, backend):
    (control,) = results[f"{m}, large batch, legacy_ddp"]
    ranks = results[f"{m}, {layout}, {backend}"]
    for rank in ranks:
        assert torch.equal(rank["parameters"], ranks[0]["parameters"])
        assert (rank["parameters"] - control["parameters"]).abs().max() < BOUND
    assert ranks[0]["logs"][-1]["loss"] == pytest.approx(control["logs"][-1]["loss"], abs=2e-3)


def test_only_groups_that_span_ranks_are_reduced(results):
    """Of 4 mini-batches of 4: no group of 4 spans ranks, two of 3 do: sentences 3 to 5, 6 to 8."""

    def reductions(m):
        rank = results[f"{m}, 2 x 2, legacy_ddp"][1]
        d = rank["parameters"].numel()
        return sum(tuple(sent) == ("all_reduce", 8 * d) for sent in rank["collectives"][-1])

    assert [reductions(m) for m in MICRO] == [3, 1]
