"""What --swa-* mean: when weights are averaged, the learning rate; and what is refused."""

from argparse import Namespace

import pytest
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY

from deltasam_fairseq.lr_schedulers.config import check_swa_config, parse_every, parse_start
from deltasam_fairseq.lr_schedulers.swa import SWAScheduler, check_start
from tests.helpers import runs, tiny

DEFAULTS = {
    "swa_start": "0.5",
    "swa_every": None,
    "swa_decay": None,
    "swa_lr": None,
    "swa_anneal": 0,
    "swa_anneal_strategy": "cos",
    "swa_cycle_length": None,
    "swa_cycle_lr": None,
    "swa_device": "model",
    "swa_validate_both": False,
    "max_update": 100,
    "max_epoch": 10,
}


def config(**values):
    return Namespace(**{**DEFAULTS, **values})


@pytest.mark.parametrize(
    "text, max_update, max_epoch, updates, epochs",
    [
        ("0", 100, 0, 0, None),
        ("40", 100, 10, 40, None),
        ("100", 100, 10, 100, None),
        ("40", 0, 0, 40, None),
        ("2ep", 100, 10, None, 2),
        ("2ep", 0, 0, None, 2),
        ("0.5", 100, 10, 50, None),
        (".25", 10, 0, 3, None),  # 2.5 rounded up
        ("0.7", 10, 0, 7, None),  # exactly, though 0.7 * 10 > 7 in floating point
        ("0.5", 0, 10, None, 5),
        ("0.75", 0, 3, None, 2),  # 2.25 rounded down
        ("0.5", 0, 1, None, 0),
    ],
)
def test_start(text, max_update, max_epoch, updates, epochs):
    cfg = config(swa_start=text, max_update=max_update, max_epoch=max_epoch)
    assert parse_start(cfg) == (updates, epochs)


@pytest.mark.parametrize(
    "values, every",
    [
        ({}, 1),
        ({"swa_every": "7"}, 7),
        ({"swa_every": "epoch"}, None),
        ({"swa_cycle_length": 5, "swa_lr": 0.1}, 5),
    ],
)
def test_every(values, every):
    check_swa_config(config(**values))
    assert parse_every(config(**values)) == every


# values; what the message must name: option, value, remedy
ERRORS = {
    "start no number": ({"swa_start": "soon"}, ["--swa-start soon", "1000", "2ep", "0.5"]),
    "start epochs of another form": ({"swa_start": "2e3"}, ["--swa-start 2e3", "2ep"]),
    "share of one": ({"swa_start": "1.0"}, ["--swa-start 1.0", "below 1"]),
    "share of nothing": ({"swa_start": "0.0"}, ["--swa-start 0.0", "above 0"]),
    "negative start": ({"swa_start": "-5"}, ["--swa-start -5", "1000"]),
    "share of an unknown length": (
        {"max_update": 0, "max_epoch": 0},
        ["--swa-start 0.5", "--max-update", "--max-epoch"],
    ),
    "start beyond the end": ({"swa_start": "101"}, ["--swa-start 101", "--max-update 100"]),
    "epochs beyond the end": ({"swa_start": "11ep"}, ["--swa-start 11ep", "--max-epoch 10"]),
    "every 0": ({"swa_every": "0"}, ["--swa-every 0", "at least 1", "epoch"]),
    "every day": ({"swa_every": "day"}, ["--swa-every day", "epoch"]),
    "negative rate": ({"swa_lr": -1.0}, ["--swa-lr -1.0", "above 0", "omit it"]),
    "no rate": ({"swa_lr": 0.0}, ["--swa-lr 0.0", "above 0"]),
    "rate nan": ({"swa_lr": float("nan")}, ["--swa-lr nan", "finite"]),
    "decay 0": ({"swa_decay": 0.0}, ["--swa-decay 0.0", "above 0 and below 1", "0.999"]),
    "decay 1": ({"swa_decay": 1.0}, ["--swa-decay 1.0", "above 0 and below 1"]),
    "decay nan": ({"swa_decay": float("nan")}, ["--swa-decay nan"]),
    "negative anneal": ({"swa_lr": 0.1, "swa_anneal": -1}, ["--swa-anneal -1", "at least 0"]),
    "anneal to nothing": ({"swa_anneal": 3}, ["--swa-anneal 3", "--swa-lr"]),
    "anneal in cycles": (
        {"swa_anneal": 3, "swa_lr": 0.1, "swa_cycle_length": 3},
        ["--swa-anneal 3", "--swa-cycle-length"],
    ),
    "cycle 0": ({"swa_lr": 0.1, "swa_cycle_length": 0}, ["--swa-cycle-length 0", "at least 1"]),
    "cycle without a rate": ({"swa_cycle_length": 3}, ["--swa-cycle-length 3", "--swa-lr"]),
    "cycle with a period": (
        {"swa_lr": 0.1, "swa_cycle_length": 3, "swa_every": "2"},
        ["--swa-every 2", "--swa-cycle-length"],
    ),
    "cycle that rises": (
        {"swa_lr": 0.1, "swa_cycle_length": 3, "swa_cycle_lr": 0.05},
        ["--swa-cycle-lr 0.05", "--swa-lr 0.1", "higher"],
    ),
    "rate of no cycle": ({"swa_cycle_lr": 0.1}, ["--swa-cycle-lr 0.1", "--swa-cycle-length"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refused(name):
    values, expected = ERRORS[name]
    with pytest.raises(ValueError) as error:
        check_swa_config(config(**values))
    assert all(part in str(error.value) for part in expected), error.value


def test_every_schedule_with_options_of_its_own_has_a_twin():
    twins = {name for name, cls in LR_SCHEDULER_REGISTRY.items() if issubclass(cls, SWAScheduler)}
    bases = "cosine fixed inverse_sqrt polynomial_decay reduce_lr_on_plateau step tri_stage"
    assert twins == {f"swa_{name}" for name in [*bases.split(), "triangular"]}


OPTIONS = {
    "cosine": ["--warmup-updates", "2"],
    "fixed": ["--lr", "[1e-3,5e-4]"],
    "inverse_sqrt": ["--warmup-updates", "2"],
    "polynomial_decay": ["--total-num-update", "12", "--warmup-updates", "2"],
    "reduce_lr_on_plateau": [],
    "step": ["--lr-deacy-period", "3"],
    "tri_stage": ["--warmup-steps", "2", "--hold-steps", "2", "--decay-steps", "4"],
    "triangular": ["--max-lr", "1e-2", "--lr-period-updates", "4"],
}


def rates(data, folder, scheduler, *more):
    run = runs.train(data, folder, "--no-save", "--lr-scheduler", scheduler, *more)
    return [float(update["lr"]) for update in run.updates]


@pytest.mark.parametrize("base", OPTIONS)
class TestRates:
    """fairseq logs the rate that the next update has: the 4th number is that after 4 updates."""

    def test_without_swa_lr_the_schedule_goes_on(self, classification, tmp_path, base):
        plain = rates(classification, tmp_path, base, *OPTIONS[base])
        swa = rates(classification, tmp_path, f"swa_{base}", *OPTIONS[base], "--swa-start", "2")
        assert swa == plain and len(swa) == 6

    def test_up_to_the_start_then_to_the_constant_rate(self, classification, tmp_path, base):
        swa = ["--swa-start", "3", "--swa-lr", "2e-3", "--swa-anneal", "2"]
        swa += ["--swa-anneal-strategy", "linear"]
        plain = rates(classification, tmp_path, base, *OPTIONS[base])
        found = rates(classification, tmp_path, f"swa_{base}", *OPTIONS[base], *swa)
        between = (plain[2] + 2e-3) / 2
        assert found == pytest.approx([*plain[:3], between, 2e-3, 2e-3], rel=1e-5)


@pytest.mark.parametrize(
    "base, more, said",
    [
        ("reduce_lr_on_plateau", [], True),
        ("reduce_lr_on_plateau", ["--swa-lr", "1e-4"], False),
        ("fixed", [], False),
    ],
)
def test_what_goes_by_the_averages_loss_is_said(classification, tmp_path, base, more, said):
    argv = tiny.arguments(classification, tmp_path, "--lr-scheduler", f"swa_{base}", *more)
    description = tiny.build_trainer(argv).lr_scheduler.describe()
    assert ("validation loss of the average" in description) == said


def test_cycles_in_a_run(classification, tmp_path):
    """From 4e-4 to 1e-4 in three updates; the rate is logged after the update that precedes it."""
    cycles = ["--swa-start", "1", "--swa-cycle-length", "3", "--swa-lr", "1e-4"]
    found = rates(classification, tmp_path, "swa_fixed", *cycles, "--swa-cycle-lr", "4e-4")
    assert found == pytest.approx([3e-4, 2e-4, 1e-4, 3e-4, 2e-4, 1e-4])
    found = rates(classification, tmp_path, "swa_fixed", *cycles)  # from the schedule's 1e-3
    assert found[:3] == pytest.approx([7e-4, 4e-4, 1e-4])


@pytest.mark.parametrize("more, warned", [([], True), (["--swa-cycle-lr", "3e-2"], False)])
def test_cycles_that_would_rise_from_the_schedules_rate(
    classification, tmp_path, caplog, more, warned
):
    """1e-3 at the start, below --swa-lr."""
    cycles = ["--swa-start", "2", "--swa-cycle-length", "2", "--swa-lr", "2e-2", *more]
    rates(classification, tmp_path, "swa_fixed", *cycles, "--max-update", "3")
    said = "--swa-lr 0.02 is above the schedule's rate at update 2, 0.001"
    assert caplog.text.count(said) == warned


class _Schedule(Namespace):
    """What `check_start` reads of a scheduler."""

    def __init__(self, **values):
        cfg = config(**values)
        super().__init__(cfg=cfg, start=parse_start(cfg), every=parse_every(cfg))


@pytest.mark.parametrize(
    "values, max_update, max_epoch, refused",
    [
        ({"swa_start": "12"}, 0, 3, False),  # 4 updates an epoch
        ({"swa_start": "13"}, 0, 3, True),
        ({"swa_start": "3ep"}, 12, 0, False),
        ({"swa_start": "3ep"}, 11, 0, True),
        ({"swa_start": "0", "swa_every": "13"}, 0, 3, True),
        ({"swa_start": "9", "swa_every": "epoch"}, 12, 0, False),
        ({"swa_start": "9", "swa_every": "epoch"}, 11, 0, True),
        ({"swa_start": "1000"}, 0, 0, False),
    ],
)
def test_against_the_data(values, max_update, max_epoch, refused):
    values = {"max_update": 0, "max_epoch": 0, **values}
    arguments = (_Schedule(**values), [4], max_update, max_epoch)
    if not refused:
        check_start(*arguments)
        return
    with pytest.raises(ValueError, match="run ends after update") as error:
        check_start(*arguments)
    assert "--swa-start" in str(error.value)


@pytest.mark.parametrize(
    "start, first",
    [
        ("0", 4),  # epochs end after updates 4, 6, 9, 12, 15, ...
        ("4", 4),
        ("5", 6),
        ("9", 9),
        ("10", 12),
        ("3000", 3000),
        ("3000000001", 3000000003),  # at once, however many epochs that is
        ("2ep", 6),
        ("1000000000ep", 3000000000),
    ],
)
def test_the_first_end_of_an_epoch_with_changing_update_freq(start, first):
    """A run of so many updates averages, one shorter does not."""
    schedule = _Schedule(swa_start=start, swa_every="epoch", max_update=0, max_epoch=0)
    check_start(schedule, [4, 2, 3], first, 0)
    with pytest.raises(ValueError, match=f"after update {first}, but"):
        check_start(schedule, [4, 2, 3], first - 1, 0)


@pytest.mark.parametrize("update_freq", ["4", "5"])
@pytest.mark.parametrize("start", ["5", "1ep"])
def test_epochs_without_updates_are_refused(classification, tmp_path, start, update_freq):
    """An epoch has 4 batches, of which the last is skipped; fairseq would go on without end."""
    options = ["--lr-scheduler", "swa_fixed", "--swa-start", start, "--swa-every", "epoch"]
    options += ["--max-epoch", "0", "--update-freq", update_freq, "--skip-remainder-batch"]
    with pytest.raises(ValueError, match="--skip-remainder-batch: .* smaller --update-freq"):
        runs.train(classification, tmp_path, *options)


def test_a_run_that_is_too_short_for_its_data(classification, tmp_path):
    options = ["--lr-scheduler", "swa_fixed", "--swa-start", "9", "--max-update", "0"]
    with pytest.raises(ValueError, match="--swa-start 9: .* after update 9, .* after update 8"):
        runs.train(classification, tmp_path, *options, "--max-epoch", "2")


class TestResumedWithOtherOptions:
    """A schedule that takes up the state of another, whose averaging has begun."""

    PHASES = {
        "--swa-decay 0.9": "--swa-decay 0.9 instead of none:",
        "--swa-every 2": "--swa-every 2 instead of 1:",
        "--swa-lr 1e-4": "--swa-lr 0.0001 instead of none:",
        "--swa-lr 1e-4 --swa-cycle-length 2": "--swa-cycle-length 2 instead of none:",
        "--swa-every 1 --swa-device cpu": None,
    }

    @staticmethod
    def schedule(data, folder, *options):
        argv = tiny.arguments(data, folder, "--lr-scheduler", "swa_fixed", *options)
        return tiny.build_trainer(argv).lr_scheduler

    @pytest.mark.parametrize("options", PHASES)
    def test_said_in_a_warning(self, classification, tmp_path, caplog, options):
        first = self.schedule(classification, tmp_path, "--swa-start", "0")
        then = self.schedule(classification, tmp_path, "--swa-start", "0", *options.split())
        then.load_state_dict(first.state_dict())
        said = self.PHASES[options]
        if said is None:
            assert "instead of" not in caplog.text
        else:
            assert said in caplog.text and "goes on" in caplog.text
            caplog.clear()
            then.load_state_dict(then.state_dict())
            assert "instead of" not in caplog.text

    def test_not_where_nothing_has_begun_or_is_known(self, classification, tmp_path, caplog):
        later = self.schedule(classification, tmp_path, "--swa-start", "3")
        then = self.schedule(classification, tmp_path, "--swa-start", "3", "--swa-every", "2")
        then.load_state_dict(later.state_dict())
        begun = self.schedule(classification, tmp_path, "--swa-start", "0")
        state = begun.state_dict()
        del state["swa_phase"]  # as files were before
        now = self.schedule(classification, tmp_path, "--swa-start", "0", "--swa-every", "2")
        now.load_state_dict(state)
        assert now.begun == 0 and "instead of" not in caplog.text


@pytest.mark.parametrize("start", ["0", "0ep", "0.1"])
def test_a_start_at_once_is_checked_too(classification, tmp_path, start):
    """0.1 of 3 epochs are 0 whole ones."""
    options = ["--lr-scheduler", "swa_fixed", "--swa-start", start, "--swa-every", "100"]
    options += ["--max-update", "0", "--max-epoch", "3"]
    with pytest.raises(ValueError, match=f"--swa-start {start}: .* update 100, .* update 12"):
        runs.train(classification, tmp_path, *options)


def test_one_batch_less_where_the_remainder_is_skipped(classification, tmp_path):
    """4 batches without the last are one update of 3 an epoch: 2 in two epochs."""
    options = ["--lr-scheduler", "swa_fixed", "--update-freq", "3", "--skip-remainder-batch"]
    options += ["--max-update", "0", "--max-epoch", "2", "--swa-start"]
    run = runs.train(classification, tmp_path, *options, "2")
    assert [update["num_updates"] for update in run.updates] == ["1", "2"]
    with pytest.raises(ValueError, match="--swa-start 3: .* after update 3, .* after update 2"):
        runs.train(classification, tmp_path, *options, "3", "--reset-lr-scheduler")


def test_a_trainer_that_averages_nothing_is_refused(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path, "--lr-scheduler", "swa_fixed")
    trainer = tiny.build_trainer(argv)
    trainer.lr_scheduler.attended = False
    with pytest.raises(RuntimeError, match="--lr-scheduler swa_fixed: .* --user-dir"):
        trainer.begin_epoch(1)
