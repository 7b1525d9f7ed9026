"""Every rank has the same average, that of one process, and sends nothing for it.

Real processes, gloo over TCP. Runs of whole programs: another number of ranks takes a run up.
"""

import pytest
import torch

from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE
from tests.distributed.test_equivalence import updates
from tests.distributed.test_failure import Runs
from tests.helpers import tiny
from tests.helpers.processes import run_ranks

SWA = ["--lr-scheduler", "swa_fixed", "--swa-start", "1"]
OPTIMIZERS = ["adam", "delta_sam_adam"]
BACKENDS = ["legacy_ddp", "pytorch_ddp"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaging")
    data = tiny.write_classification(folder / "data", longest=50)
    runs = {}
    for optimizer in OPTIMIZERS:
        for backend in BACKENDS:
            argv = tiny.arguments(
                data,
                folder,
                *("--optimizer", optimizer, "--ddp-backend", backend),
                *("--criterion", "float64_sentence_prediction", "--find-unused-parameters"),
                *("--dropout", "0", "--attention-dropout", "0", "--no-save"),
            )
            for name, layout in (("1", [[16]]), ("2", [[4, 4], [4, 4]])):
                spec = {"updates": updates(layout), "dtype": "float64"}
                runs[f"{name}, {optimizer}, {backend}"] = {**spec, "argv": argv + SWA}
                if name == "2":
                    runs[f"plain, {optimizer}, {backend}"] = {**spec, "argv": argv}
    return run_ranks(folder, runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestTwoRanks:
    def test_the_same_on_both_and_as_one_process(self, results, optimizer, backend):
        (one,) = results[f"1, {optimizer}, {backend}"]
        ranks = results[f"2, {optimizer}, {backend}"]
        assert one["average"].keys() == ranks[0]["average"].keys()
        for name, value in one["average"].items():
            assert torch.equal(ranks[0]["average"][name], ranks[1]["average"][name])
            torch.testing.assert_close(ranks[0]["average"][name], value, rtol=0, atol=1e-9)

    def test_nothing_is_sent(self, results, optimizer, backend):
        """The messages of an update are those of a run without averaging."""
        for swa, plain in zip(
            results[f"2, {optimizer}, {backend}"], results[f"plain, {optimizer}, {backend}"]
        ):
            assert swa["collectives"] == plain["collectives"] and swa["collectives"][0]


def test_another_number_of_ranks(classification, tmp_path):
    """Begun by 2 ranks, 3 updates of 8 sentences, taken up by 1, and the other way round."""
    runs = Runs(tmp_path, classification)
    plain = ["--dropout", "0", "--attention-dropout", "0", *SWA, "--swa-lr", "1e-3"]
    accumulated = {1: ["--update-freq", "4"], 2: ["--update-freq", "2"]}
    for first, then in ((2, 1), (1, 2), (1, 1)):
        save = f"{first} then {then}"
        stop = ["--max-update", "3"]
        runs.add(f"{save}, begun", first, *plain, *accumulated[first], *stop, save=save)
        runs.add(save, then, *plain, *accumulated[then], "--max-update", "6")
    runs.make()
    ends = {}
    for name in ("2 then 1", "1 then 2", "1 then 1"):
        assert runs.ends(name)["status"] == [0] * int(name[-1]), runs.log(name)
        ends[name] = torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)
        assert "going on with an average of 3 weights" in runs.log(name)
        assert ends[name]["extra_state"][WEIGHT_AVERAGE]["n"] == 6
    for name in ("2 then 1", "1 then 2"):
        for key, value in ends["1 then 1"]["model"].items():
            torch.testing.assert_close(ends[name]["model"][key], value, rtol=1e-4, atol=1e-5)


def test_validated_by_two_ranks(classification, tmp_path):
    """Both ranks put the average in force: what they log is what one process logs."""
    runs = Runs(tmp_path, classification)
    for size in (1, 2):
        options = ["--update-freq", str(4 // size), "--dropout", "0", "--attention-dropout", "0"]
        runs.add(f"{size}", size, *options, *SWA, "--swa-validate-both", "--lr", "3e-2")
    for spec in runs.specs:
        spec["ranks"] = [[w for w in argv if w != "--disable-validation"] for argv in spec["ranks"]]
    runs.make()
    losses = {}
    for size in (1, 2):
        assert runs.ends(str(size))["status"] == [0] * size, runs.log(str(size))
        files = [tmp_path / str(size) / f"checkpoint{n}.pt" for n in ("_1_2", "1")]
        losses[size] = [torch.load(f, weights_only=False)["extra_state"]["val_loss"] for f in files]
        assert '"valid_raw_loss"' in runs.log(str(size))
    assert losses[1] == pytest.approx(losses[2], abs=2e-3)
