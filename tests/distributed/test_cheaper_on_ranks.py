"""Cheaper ascents on several ranks, float64, against one process.

Real processes, gloo over TCP. Bounds are those of test_equivalence: the order of summation.
"""

import pytest
import torch

from deltasam_fairseq.algorithms import SENTENCES, update_generator
from deltasam_fairseq.trainer.subsampling import draw_sentences
from tests.distributed.test_equivalence import BACKENDS, BOUND, LAYOUTS, updates
from tests.helpers import tiny
from tests.helpers.processes import run_ranks

OPTIMIZERS = ["sam_adam", "delta_sam_adam"]
SEED, CRITERION, OWN_WEIGHT = 3, "float64_sentence_prediction", "parameter_criterion"
HALF = ["--sam-ascent-fraction", "0.5"]
NORMS = ["--sam-only", "layer_norm"]
# delta-SAM keeps half of every micro-batch: one process has the same ones, one after the other.
IN_A_ROW = {"2 x 2": [[4, 4, 4, 4]], "rank ends with a dummy": [[7, 6, 3]]}


def drawn(batch, layout):
    """Sentences that plain SAM ascends from in the first update."""
    found, at = [], 0
    for rank, sizes in enumerate(layout):
        generator = update_generator(SEED, 0, SENTENCES, torch.device("cpu"), rank)
        for size in sizes:
            found += [batch[at + i] for i in draw_sentences(size, 0.5, generator).tolist()]
            at += size
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheaper")
    data = tiny.write_classification(folder / "data", longest=50)
    runs = {}

    def add(name, layout, optimizer, backend, *more, criterion=CRITERION):
        argv = tiny.arguments(
            data,
            folder,
            *("--optimizer", optimizer, "--criterion", criterion, "--ddp-backend", backend),
            *("--dropout", "0", "--attention-dropout", "0", "--find-unused-parameters"),
            *("--no-save", "--bucket-cap-mb", "1", *more),
        )
        runs[name] = {"argv": argv, "updates": updates(layout), "dtype": "float64"}

    for optimizer in OPTIMIZERS:
        whole = LAYOUTS["large batch"]
        add(f"norms, {optimizer}", whole, optimizer, "legacy_ddp", *NORMS)
        own = f"temperature, {optimizer}"
        only = ["--sam-only", "temperature|layer_norm"]
        add(own, whole, optimizer, "legacy_ddp", *only, criterion=OWN_WEIGHT)
        for backend in BACKENDS:
            for layout in ("2 x 2", "rank ends with a dummy"):
                split = LAYOUTS[layout]
                add(f"norms, {optimizer}, {layout}, {backend}", split, optimizer, backend, *NORMS)
                add(f"half, {optimizer}, {layout}, {backend}", split, optimizer, backend, *HALF)
            split = LAYOUTS["2 x 2"]
            add(f"{own}, {backend}", split, optimizer, backend, *only, criterion=OWN_WEIGHT)
            name = f"rank scope, {optimizer}, {backend}"
            add(name, split, optimizer, backend, *NORMS, *HALF, "--sam-scope", "rank")
    for layout, row in IN_A_ROW.items():
        add(f"half, delta_sam_adam, {layout}", row, "delta_sam_adam", "legacy_ddp", *HALF)
        add(f"drawn, {layout}", LAYOUTS["large batch"], "sam_adam", "legacy_ddp")
        batch = runs[f"drawn, {layout}"]["updates"][0][0][0]
        runs[f"drawn, {layout}"]["updates"] = [[[drawn(batch, LAYOUTS[layout])]]]
    tiny_rho = ["--sam-rho", "1e-13"]
    add("adam", LAYOUTS["large batch"], "adam", "legacy_ddp")
    add("no rho", LAYOUTS["rank ends with a dummy"], "sam_adam", "legacy_ddp", *HALF, *tiny_rho)
    return run_ranks(folder, runs)


def assert_equal(ranks, control):
    for rank in ranks:
        assert (rank["parameters"] - control["parameters"]).abs().max() < BOUND
        assert len(rank["eps"]) == len(control["eps"]) == 3
        for eps, expected in zip(rank["eps"], control["eps"]):
            assert (eps - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(IN_A_ROW))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_some_weights_equal_one_process(results, optimizer, layout, backend):
    (control,) = results[f"norms, {optimizer}"]
    assert_equal(results[f"norms, {optimizer}, {layout}, {backend}"], control)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_of_the_criterion_equal_one_process(results, optimizer, backend):
    (control,) = results[f"temperature, {optimizer}"]
    assert control["eps"][0][-1] != 0
    assert_equal(results[f"temperature, {optimizer}, {backend}"], control)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(IN_A_ROW))
def test_most_unguarded_equal_one_process(results, layout, backend):
    (control,) = results[f"half, delta_sam_adam, {layout}"]
    assert_equal(results[f"half, delta_sam_adam, {layout}, {backend}"], control)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(IN_A_ROW))
def test_drawn_sentences_of_all_ranks_make_the_ascent(results, layout, backend):
    """eps* of the first update is that of a batch of all that the ranks drew, each its own."""
    (control,) = results[f"drawn, {layout}"]
    for rank in results[f"half, sam_adam, {layout}, {backend}"]:
        assert (rank["eps"][0] - control["eps"][0]).norm() < 1e-7 * control["eps"][0].norm()


def test_descent_is_that_of_the_whole_batch(results):
    """Next to no perturbation, and all sentences in the descent's gradient: Adam."""
    (control,) = results["adam"]
    for rank in results["no rho"]:
        assert len(rank["eps"]) == 3
        assert (rank["parameters"] - control["parameters"]).abs().max() < BOUND


def test_ranks_end_alike_bitwise(results):
    for ranks in results.values():
        assert all(torch.equal(r["parameters"], ranks[0]["parameters"]) for r in ranks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rank_scope_ascends_apart(results, optimizer, backend):
    first, second = results[f"rank scope, {optimizer}, {backend}"]
    for eps, other in zip(first["eps"], second["eps"]):
        assert eps.norm().item() == pytest.approx(0.05) == other.norm().item()
        assert (eps - other).norm() > 1e-5  # another direction


def test_what_is_sent_for_some_weights_is_their_gradient(results):
    """One all-reduce of 10 x 16 float64 numbers in place of one of all gradients."""
    name = "norms, sam_adam, 2 x 2, legacy_ddp"
    sent = [tuple(call) for call in results[name][0]["collectives"][-1]]
    whole = ("all_reduce", 8 * results[name][0]["parameters"].numel())
    assert sent.count(("all_reduce", 8 * 160)) == 1 and sent.count(whole) == 1
