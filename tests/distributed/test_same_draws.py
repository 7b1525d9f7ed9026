"""All ranks see in the first update whether they draw the same numbers from one seed."""

import pytest

from tests.helpers import tiny
from tests.helpers.processes import run_ranks

HALF = ["--bf16"]
# What is drawn for all ranks alike, and what is not.
COMPARED = {
    "direction": ["--optimizer", "delta_sam_adam"],
    "direction, gathered logs": ["--optimizer", "delta_sam_adam", "--criterion", "plain"],
    "direction in half precision": ["--optimizer", "delta_sam_adam", *HALF],
    "rounding": ["--optimizer", "sam_adam", *HALF],
}
NOT_COMPARED = {
    "nothing": ["--optimizer", "sam_adam"],
    "each its own": ["--optimizer", "delta_sam_adam", "--sam-scope", "rank"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draws")
    data = tiny.write_classification(folder / "data")
    runs = {}
    for name, options in {**COMPARED, **NOT_COMPARED}.items():
        argv = tiny.arguments(
            data,
            folder,
            *("--ddp-backend", "legacy_ddp", "--find-unused-parameters", "--no-save", *options),
        )
        updates = [[[[0, 1, 2]], [[3, 4]]], [[[5, 6]], [[7]]]]
        spec = {"argv": argv, "updates": updates, "dtype": "float32"}
        runs[name] = spec
        runs[f"{name}, other numbers"] = dict(spec, other_numbers=True)
    return run_ranks(folder, runs)


@pytest.mark.parametrize("name", list(COMPARED))
def test_all_ranks_refuse_other_numbers(results, name):
    for rank in results[f"{name}, other numbers"]:
        assert "draw different random numbers from one --seed" in rank["error"]
        assert "--sam-scope rank" in rank["error"]
        assert not rank["logs"]  # in the first update, before any step


@pytest.mark.parametrize("name", [*COMPARED, *NOT_COMPARED])
def test_the_same_numbers_cost_no_collective(results, name):
    for rank in results[name]:
        assert "error" not in rank
        first, second = ([call for call, _ in update] for update in rank["collectives"])
        assert first == second


@pytest.mark.parametrize("name", list(NOT_COMPARED))
def test_what_need_not_agree(results, name):
    assert all("error" not in rank for rank in results[f"{name}, other numbers"])
