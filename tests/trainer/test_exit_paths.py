"""Every way out of an update leaves the weights as they were, in the model and in checkpoints.

An incident is made to happen at a stage of the second update: in the forward of the ascent, of
the probe or of the descent, or between fairseq's own doings after it. Afterwards the update is
made again, and must end where the update of a trainer without the incident ends.
"""

import copy
import os
import signal
import sys

import fairseq.trainer
import pytest
import torch

import deltasam_fairseq
from deltasam_fairseq.optim import sharpness_aware
from deltasam_fairseq.trainer.checkpoint_state import load_extra_checkpoint_state
from tests.helpers import tiny

CRASH = "crash.pt"
FORWARDS = {
    "sam_adam": ["ascent", "descent"],
    "delta_sam_adam": ["ascent", "probe", "descent"],
}
AFTER = ["all_reduce_grads", "multiply_grads", "clip_grad_norm", "step"]  # of the optimizer
FORWARD_STAGES = [(name, stage) for name, stages in FORWARDS.items() for stage in stages]
RW_SAM = [("delta_sam_adam --delta-sam-weights gibbs", stage) for stage in ("ascent", "probe")]
# Its "probe" is the forward at the weights before the last update.
THETA = [("sam_adam --sam-radius trust_region_theta --sam-rho 0.05 --lr 0.1", "probe")]
# Weights move in one way where they are all there is, in another where they have float32 copies.
PRECISIONS = {
    "float32": [],
    "half": ["--memory-efficient-fp16"],
    "half with copies": ["--fp16", "--fp16-no-flatten-grads"],
}
STAGES = FORWARD_STAGES + [(name, stage) for name in FORWARDS for stage in AFTER]


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))


def saved(trainer, path):
    """Weights of a checkpoint in the order of `tiny.weights`."""
    found = tiny.checkpoint_weights(path)
    return [found[name] for name, _ in trainer.get_model().named_parameters()]


def state(trainer):
    """Weights as a checkpoint would have them now, in the order of `tiny.weights`."""
    found = trainer.state_dict()["model"]
    return [found[name].clone() for name, _ in trainer.get_model().named_parameters()]


def save(trainer, path):
    """What fairseq's own saving does."""
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"epoch": 1})


class Case:
    """A trainer after one update, its next samples, and how its next update ends undisturbed."""

    def __init__(self, data, save_dir, optimizer, *more, micro_batches=1, criterion):
        """``optimizer`` is its name and perhaps options."""
        options = ["--sam-rho", "0.5", "--dropout", "0.1", "--optimizer", *optimizer.split(), *more]
        argv = tiny.arguments(data, save_dir, *options, criterion=criterion)
        self.save_dir = save_dir
        self.trainer, control = tiny.build_trainer(argv), tiny.build_trainer(argv)
        for trainer in (control, self.trainer):
            samples = tiny.batches(trainer)
            trainer.train_step(samples[:micro_batches])
            self.before = tiny.weights(trainer)
            self.samples = samples[micro_batches : 2 * micro_batches]
            if trainer is control:
                trainer.train_step(self.samples)
                self.after = tiny.weights(trainer)
        assert not same(self.before, self.after)
        self.trainer.consolidate_optimizer()
        self._start = copy.deepcopy(self.trainer.state_dict())

    def reset(self):
        """Back to after the first update; no crash.pt."""
        for name, p in self.trainer.get_model().named_parameters():
            p.data.copy_(self._start["model"][name])
        self.trainer._build_optimizer()  # in half precision it has copies of the weights
        optimizer_state = copy.deepcopy(self._start["last_optimizer_state"])
        self.trainer.optimizer.load_state_dict(optimizer_state)
        load_extra_checkpoint_state(self.trainer, copy.deepcopy(self._start["extra_state"]))
        self.trainer.set_num_updates(1)
        self.trainer._amp_retries = 0
        if (self.save_dir / CRASH).exists():
            (self.save_dir / CRASH).unlink()
        assert same(tiny.weights(self.trainer), self.before)

    def stage(self):
        if same(tiny.weights(self.trainer), self.before):
            return "ascent"
        return "descent" if torch.is_grad_enabled() else "probe"

    def at(self, stage, act, monkeypatch):
        """Call ``act`` once, right after the forward ``stage`` or before the optimizer's.

        What ``act`` returns, if anything, takes the place of the forward's loss.
        """
        reached = []
        if stage in AFTER:
            # Since the ascent calls some of them too: only those of the descent.
            original = getattr(self.trainer.optimizer, stage)

            def trapped(*args, **kwargs):
                if not reached and self.stage() == "descent":
                    reached.append(stage)
                    act()
                return original(*args, **kwargs)

            monkeypatch.setattr(self.trainer.optimizer, stage, trapped)
            return reached
        criterion = self.trainer.get_criterion()
        forward = criterion.forward

        def trapped_forward(*args, **kwargs):
            loss, *rest = forward(*args, **kwargs)
            if not reached and self.stage() == stage:
                reached.append(stage)
                instead = act()
                loss = loss if instead is None else instead * loss
            return (loss, *rest)

        monkeypatch.setattr(criterion, "forward", trapped_forward)
        return reached

    def assert_restored(self):
        assert same(tiny.weights(self.trainer), self.before)
        assert self.trainer.get_num_updates() == 1

    def assert_crash_file(self, written=True):
        path = self.save_dir / CRASH
        assert path.exists() == written
        if written:
            assert same(saved(self.trainer, path), self.before)

    def assert_update_works(self):
        self.trainer.train_step(self.samples)
        assert same(tiny.weights(self.trainer), self.after)
        assert self.trainer.get_num_updates() == 2


@pytest.fixture(scope="module")
def cases(classification, translation, tmp_path_factory):
    made, data = {}, {"sentence_prediction": classification, "cross_entropy": translation}

    def find(*words, micro_batches=1, criterion="sentence_prediction"):
        key = (words, micro_batches, criterion)
        if key not in made:
            kwargs = {"micro_batches": micro_batches, "criterion": criterion}
            folder = tmp_path_factory.mktemp("case")
            made[key] = Case(data[criterion], folder, *words, **kwargs)
        return made[key]

    return find


@pytest.fixture
def case_of(cases):
    def find(*args, **kwargs):
        case = cases(*args, **kwargs)
        case.reset()
        return case

    return find


def raiser(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("optimizer, stage", STAGES + RW_SAM)
@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()], ids=repr)
def test_error_that_fairseq_lets_through(case_of, monkeypatch, optimizer, stage, error):
    case = case_of(optimizer)
    with monkeypatch.context() as patch:
        reached = case.at(stage, raiser(error), patch)
        with pytest.raises(type(error)):
            case.trainer.train_step(case.samples)
    assert reached
    case.assert_restored()
    case.assert_crash_file(written=False)
    case.assert_update_works()


@pytest.mark.parametrize("optimizer, stage", FORWARD_STAGES + RW_SAM + THETA)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_on_which_fairseq_saves_a_checkpoint(
    case_of, monkeypatch, optimizer, stage, precision
):
    case = case_of(optimizer, *PRECISIONS[precision])
    with monkeypatch.context() as patch:
        assert case.at(stage, raiser(ValueError("bug in the criterion")), patch) == []
        with pytest.raises(ValueError, match="bug in the criterion"):
            case.trainer.train_step(case.samples)
    case.assert_restored()
    case.assert_crash_file()
    case.assert_update_works()


@pytest.mark.parametrize("stage", ["ascent", "probe", "descent"])
def test_error_in_the_second_of_two_micro_batches(case_of, monkeypatch, stage):
    case = case_of("delta_sam_adam", micro_batches=2)
    with monkeypatch.context() as patch:
        passed = []

        def second_time():
            passed.append(1)
            if len(passed) == 2:
                raise ValueError("bug")

        criterion, forward = case.trainer.get_criterion(), case.trainer.get_criterion().forward

        def trapped(*args, **kwargs):
            if case.stage() == stage:
                second_time()
            return forward(*args, **kwargs)

        patch.setattr(criterion, "forward", trapped)
        with pytest.raises(ValueError):
            case.trainer.train_step(case.samples)
    case.assert_restored()
    case.assert_crash_file()
    case.assert_update_works()


@pytest.mark.parametrize("optimizer, stage", FORWARD_STAGES)
def test_out_of_memory_skips_the_batch(case_of, monkeypatch, optimizer, stage):
    case = case_of(optimizer)
    with monkeypatch.context() as patch:
        reached = case.at(stage, raiser(RuntimeError("CUDA out of memory.")), patch)
        assert case.trainer.train_step(case.samples) is None
    assert reached
    case.assert_restored()
    case.assert_crash_file(written=False)
    assert all(p.grad is None or not p.grad.any() for p in case.trainer.model.parameters())
    case.assert_update_works()


@pytest.mark.parametrize("optimizer, stage", FORWARD_STAGES)
def test_out_of_memory_is_raised_where_fairseq_asks_for_it(case_of, monkeypatch, optimizer, stage):
    case = case_of(optimizer)
    with monkeypatch.context() as patch:
        case.at(stage, raiser(RuntimeError("CUDA out of memory.")), patch)
        with pytest.raises(RuntimeError, match="out of memory"):
            case.trainer.train_step(case.samples, raise_oom=True)
    case.assert_restored()
    case.assert_update_works()


# fairseq's NanDetector, which it runs to find the culprit, stumbles over RoBERTa's dict of lists
# with StopIteration, on recent torch, SAM or not.
NAN_FOUND = (FloatingPointError, StopIteration)


def nan():
    return torch.tensor(float("nan"))


def test_nan_in_the_descent(case_of, monkeypatch):
    case = case_of("sam_adam")
    with monkeypatch.context() as patch:
        case.at("descent", nan, patch)
        with pytest.raises(NAN_FOUND):
            case.trainer.train_step(case.samples)
    case.assert_restored()
    case.assert_crash_file()
    case.assert_update_works()


def test_nan_in_the_ascent(case_of, monkeypatch):
    """The perturbed weights are all NaN then; the model and crash.pt have none of it."""
    case = case_of("sam_adam")
    with monkeypatch.context() as patch:
        case.at("ascent", nan, patch)
        with pytest.raises(NAN_FOUND):
            case.trainer.train_step(case.samples)
    case.assert_restored()
    case.assert_crash_file()
    case.assert_update_works()


def test_nan_for_good(case_of, monkeypatch):
    """A weight that is NaN already: fairseq's crash.pt has it, and the rest as it is."""
    case = case_of("delta_sam_adam")
    weight = next(case.trainer.get_model().parameters())
    weight.data[5] = float("nan")
    before = [w.nan_to_num(nan=7.0) for w in tiny.weights(case.trainer)]
    with pytest.raises(NAN_FOUND):
        case.trainer.train_step(case.samples)
    for found in (tiny.weights(case.trainer), saved(case.trainer, case.save_dir / CRASH)):
        assert same([w.nan_to_num(nan=7.0) for w in found], before)


@pytest.mark.parametrize("optimizer", FORWARDS)
def test_overflow_skips_the_update(case_of, monkeypatch, optimizer):
    """What the fp16 optimizer raises while it clips; fairseq counts no update."""
    case = case_of(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        reached = case.at("clip_grad_norm", raiser(OverflowError("loss scale")), patch)
        assert case.trainer.train_step(case.samples) is None
    assert reached
    case.assert_restored()
    case.assert_crash_file(written=False)
    case.assert_update_works()


class AmpOverflow:
    """The first gradients of an update overflow, ``times`` times over: AMP does not step then."""

    def __init__(self, trainer, monkeypatch, times):
        self.trainer, self.left = trainer, times
        self.clip, self.step = trainer.clip_grad_norm, trainer.task.optimizer_step
        self.perturbed, self.weights = [], tiny.weights(trainer)
        monkeypatch.setattr(trainer, "clip_grad_norm", self.clip_grad_norm)
        monkeypatch.setattr(trainer.task, "optimizer_step", self.optimizer_step)

    def clip_grad_norm(self, max_norm):
        norm = self.clip(max_norm)
        return norm * float("inf") if self.left else norm

    def optimizer_step(self, optimizer, **kwargs):
        if self.left:  # GradScaler.step calls no step of the optimizer
            self.left -= 1
            self.perturbed.append(not same(tiny.weights(self.trainer), self.weights))
        else:
            self.step(optimizer, **kwargs)


@pytest.mark.parametrize("optimizer", FORWARDS)
def test_amp_makes_the_step_again_from_within(case_of, monkeypatch, optimizer):
    """fairseq calls train_step in train_step, with the weights of the first still perturbed."""
    case = case_of(optimizer, "--amp")
    amp = AmpOverflow(case.trainer, monkeypatch, times=2)
    case.assert_update_works()
    assert amp.perturbed == [True, True]


METHODS = {
    "GSAM": "sam_adam --sam-gsam-alpha 0.4",
    "functional": "sam_adam --sam-functional",
    "functional, sentences weighed": "delta_sam_adam --sam-functional",
    "Fisher": "sam_adam --sam-mask fisher --sam-mask-every 1",
    "TRAM": "sam_adam --sam-radius trust_region --sam-trust-sigma 1 --sam-rho 0.05",
    "TRAM-theta": "sam_adam --sam-radius trust_region_theta --sam-rho 0.05",
    "RW-SAM": "delta_sam_adam --delta-sam-weights gibbs",
}
OF_TOKENS = ["functional", "functional, sentences weighed", "Fisher"]  # its forward unreduced
STEPS = [(name, "sentence_prediction") for name in METHODS]
STEPS += [(name, "cross_entropy") for name in OF_TOKENS]


@pytest.mark.parametrize("method, criterion", STEPS)
def test_methods_make_the_step_again_and_leave_nothing_behind(
    case_of, monkeypatch, method, criterion
):
    """Under --amp again from within; after an error in the descent, by a new call."""
    case = case_of(METHODS[method], "--amp", criterion=criterion)
    with monkeypatch.context() as patch:
        amp = AmpOverflow(case.trainer, patch, times=2)
        case.assert_update_works()
        assert amp.perturbed == [True, True]
    for stage in ("clip_grad_norm", "descent"):
        case.reset()
        with monkeypatch.context() as patch:
            reached = case.at(stage, raiser(RuntimeError("bug")), patch)
            with pytest.raises(RuntimeError, match="bug"):
                case.trainer.train_step(case.samples)
        assert reached
        case.assert_restored()
        assert "multiply_grads" not in vars(case.trainer.optimizer)
        # After "descent" it is there: monkeypatch puts back what it found in the class.
        assert stage == "descent" or "forward" not in vars(case.trainer.get_criterion())
        case.assert_update_works()


@pytest.mark.parametrize("optimizer", FORWARDS)
def test_amp_gives_the_batch_up(case_of, monkeypatch, optimizer):
    case = case_of(optimizer, "--amp")
    with monkeypatch.context() as patch:
        amp = AmpOverflow(case.trainer, patch, times=3)  # fairseq's amp_batch_retries is 2
        case.trainer.train_step(case.samples)
        assert amp.left == 0
    case.assert_restored()
    case.assert_update_works()


@pytest.mark.parametrize("optimizer, stage", STAGES)
def test_checkpoint_saved_by_a_signal_handler(case_of, monkeypatch, optimizer, stage, tmp_path):
    """The handler of a cluster's SIGTERM; the update goes on after it as if nothing had been."""
    case, path = case_of(optimizer), tmp_path / "preempted.pt"
    old = signal.signal(signal.SIGTERM, lambda *_: save(case.trainer, path))
    try:
        case.at(stage, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
        case.assert_update_works()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert same(saved(case.trainer, path), case.before)


@pytest.mark.parametrize("optimizer", FORWARDS)
def test_handler_that_saves_and_leaves(case_of, monkeypatch, optimizer, tmp_path):
    case, path = case_of(optimizer), tmp_path / "preempted.pt"

    def save_and_exit(*_):
        save(case.trainer, path)
        sys.exit(0)

    old = signal.signal(signal.SIGTERM, save_and_exit)
    try:
        with monkeypatch.context() as patch:
            case.at("descent", lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
            with pytest.raises(SystemExit):
                case.trainer.train_step(case.samples)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert same(saved(case.trainer, path), case.before)
    case.assert_restored()
    case.assert_update_works()


# Every line at once: what happens between two lines of the plugin or of fairseq's trainer.

TRACED = (os.path.dirname(deltasam_fairseq.__file__), fairseq.trainer.__file__)


EVERY_LINE = [("sam_adam", "float32"), *(("delta_sam_adam", name) for name in PRECISIONS)]


class EveryLine:
    """Calls ``act(number)`` before every line of the traced files that runs in ``call``."""

    def __init__(self, act):
        self.act, self.lines, self.acting = act, 0, False

    def __call__(self, call):
        outer = sys.gettrace()
        sys.settrace(self.enter)
        try:
            return call()
        finally:
            sys.settrace(outer)

    def enter(self, frame, event, arg):
        wanted = frame.f_code.co_filename.startswith(TRACED) and not self.acting
        return self.line if wanted else None

    def line(self, frame, event, arg):
        if event == "line" and not self.acting:
            self.acting = True
            try:
                self.lines += 1
                self.act(self.lines)
            finally:
                self.acting = False
        return self.line


@pytest.mark.parametrize("optimizer, precision", EVERY_LINE)
def test_checkpoint_at_any_line_is_that_of_before_or_after(case_of, optimizer, precision):
    """No line of an update at which a checkpoint would hold anything else."""
    case, seen = case_of(optimizer, *PRECISIONS[precision]), []

    def look(_):
        found = state(case.trainer)
        seen.append(
            "before" if same(found, case.before) else "after" if same(found, case.after) else "?"
        )

    lines = EveryLine(look)
    lines(lambda: case.trainer.train_step(case.samples))
    assert lines.lines > 100
    assert seen == sorted(seen, key=["before", "after", "?"].index) and "?" not in seen
    assert {"before", "after"} == set(seen)
    assert same(tiny.weights(case.trainer), case.after)


@pytest.mark.parametrize("optimizer, precision", EVERY_LINE)
def test_interrupt_at_any_line(case_of, optimizer, precision):
    """Control-C anywhere in an update: a checkpoint then has the weights of before or after."""
    case = case_of(optimizer, *PRECISIONS[precision])
    counter = EveryLine(lambda _: None)
    counter(lambda: case.trainer.train_step(case.samples))
    perturbed = []
    for at in range(1, counter.lines + 1, 19 if precision == "float32" else 47):
        sharpness_aware(case.trainer.optimizer).restore()
        case.reset()

        def interrupt(number, at=at):
            if number == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            EveryLine(interrupt)(lambda: case.trainer.train_step(case.samples))
        found = state(case.trainer)
        assert same(found, case.before) or same(found, case.after), at
        if not same(tiny.weights(case.trainer), found):
            perturbed.append(at)
    # Interrupted in the `finally` itself. The next update restores, and so does a checkpoint.
    assert len(perturbed) <= 1
