"""Criterions with forwards and backwards of their own, on ranks and micro-batches.

As test_equivalence: real processes against one with one batch, in float64, without dropout, with
noise that depends on the sentence only.
"""

import itertools

import pytest
import torch

from tests.distributed.test_equivalence import BOUND, updates
from tests.helpers import tiny
from tests.helpers.processes import run_ranks

LAYOUTS = {
    "large batch": [[16]],
    "2 x 2": [[4, 4], [4, 4]],
    "rank without sentences": [[10, 6], [0, 0]],
}
OPTIMIZERS = ["adam", "sam_adam", "delta_sam_adam"]
BACKENDS = ["legacy_ddp", "pytorch_ddp"]
CRITERIONS = {
    "r3f": "--eps 0.1",
    "r_drop": "",
    "freelb": "--adv-lr 0.1",
    "smart": "--smart-eps 0.05 --smart-sigma 0.05 --smart-step-size 0.1 --smart-momentum 0.5",
    "vat": "--vat-xi 0.5",  # a smaller step magnifies the order of summation
    "distill": "--distill-lambda 0.7",
}


def cases():
    for criterion, optimizer in itertools.product(CRITERIONS, OPTIMIZERS):
        yield criterion, optimizer, "large batch", "legacy_ddp"
        for backend in BACKENDS:
            yield criterion, optimizer, "2 x 2", backend
    yield "freelb", "delta_sam_adam", "rank without sentences", "pytorch_ddp"
    yield "freelb", "sam_adam", "rank without sentences", "pytorch_ddp"
    yield "smart", "delta_sam_adam", "rank without sentences", "legacy_ddp"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regularisers")
    data = tiny.write_classification(folder / "data", longest=50)
    tiny.write_teacher(data, "sentence_prediction")
    runs = {}
    for case in cases():
        criterion, optimizer, layout, backend = case
        argv = tiny.arguments(
            data,
            folder,
            *("--optimizer", optimizer, "--ddp-backend", backend, "--find-unused-parameters"),
            *("--dropout", "0", "--attention-dropout", "0", "--no-save", "--bucket-cap-mb", "1"),
            *CRITERIONS[criterion].split(),
            criterion=criterion,
        )
        runs[", ".join(case)] = {
            "argv": argv,
            "updates": updates(LAYOUTS[layout]),
            "dtype": "float64",
            "same_noise": True,
        }
    return run_ranks(folder, runs)


@pytest.mark.parametrize(
    "case", [c for c in cases() if c[2] != "large batch"], ids=lambda case: ", ".join(case)
)
def test_equals_one_process_with_one_batch(results, case):
    criterion, optimizer, _, _ = case
    (control,) = results[", ".join((criterion, optimizer, "large batch", "legacy_ddp"))]
    ranks = results[", ".join(case)]
    for rank in ranks:
        assert torch.equal(rank["parameters"], ranks[0]["parameters"])
        assert (rank["parameters"] - control["parameters"]).abs().max() < BOUND
        assert rank["logs"][-1]["loss"] == pytest.approx(control["logs"][-1]["loss"], abs=2e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_criterions_do_not_learn_the_same(results, optimizer):
    """Without which equality with a control would mean little."""
    ends = [
        results[", ".join((criterion, optimizer, "large batch", "legacy_ddp"))][0]["parameters"]
        for criterion in CRITERIONS
    ]
    for one, other in itertools.combinations(ends, 2):
        assert (one - other).abs().max() > 1e3 * BOUND
