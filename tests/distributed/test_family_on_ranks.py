"""Methods of the family on two ranks and several micro-batches, float64, against one process.

Real processes, gloo over TCP. Bounds are those of test_equivalence: the order of summation.
"""

import pytest
import torch

from tests.distributed.test_equivalence import BACKENDS, BOUND, LAYOUTS, updates
from tests.helpers import tiny
from tests.helpers.processes import run_ranks

METHODS = {
    "RW-SAM": ["--optimizer", "delta_sam_adam", "--delta-sam-weights", "gibbs"],
    "functional": ["--sam-functional"],
    "Fisher": ["--sam-mask", "fisher", "--sam-mask-every", "2"],
    "TRAM": ["--sam-radius", "trust_region", "--sam-trust-sigma", "1"],
    "TRAM-theta": ["--sam-radius", "trust_region_theta"],
    "GSAM": ["--sam-gsam-alpha", "0.4", "--sam-rho-schedule", "lr", "--warmup-updates", "9"],
}
SPLIT = ["2 x 2", "rank ends with a dummy"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    data = tiny.write_classification(folder / "data", longest=50)
    runs = {}
    for method, options in METHODS.items():
        for layout in ["large batch", *SPLIT]:
            for backend in BACKENDS if layout in SPLIT else BACKENDS[:1]:
                argv = tiny.arguments(
                    *(data, folder, "--optimizer", "sam_adam", "--ddp-backend", backend),
                    *("--dropout", "0", "--attention-dropout", "0", "--find-unused-parameters"),
                    *("--no-save", "--bucket-cap-mb", "1", *options),
                    criterion="sentence_prediction",
                )
                argv += ["--criterion", "float64_sentence_prediction"]
                runs[f"{method}, {layout}, {backend}"] = {
                    "argv": argv,
                    "updates": updates(LAYOUTS[layout]),
                    "dtype": "float64",
                    "same_noise": True,
                }
    return run_ranks(folder, runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", SPLIT)
@pytest.mark.parametrize("method", METHODS)
def test_equals_one_process_with_one_batch(results, method, layout, backend):
    (control,) = results[f"{method}, large batch, legacy_ddp"]
    ranks = results[f"{method}, {layout}, {backend}"]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    for rank in ranks:
        assert (rank["parameters"] - control["parameters"]).abs().max() < BOUND
        for eps, expected in zip(rank["eps"], control["eps"]):
            assert (eps - expected).norm() <= 1e-7 * expected.norm()
        assert expected.norm() > 0  # not of the first update of TRAM-theta
