"""A learning-rate schedule that says when the weights of a run are averaged."""

import logging
import math
from typing import Any, Dict, Optional, Sequence, Type

from fairseq.optim.lr_scheduler import FairseqLRScheduler

from deltasam_fairseq.algorithms import annealed_rate, cyclical_rate
from deltasam_fairseq.lr_schedulers.config import check_swa_config, parse_every, parse_start

logger = logging.getLogger(__name__)

# Keys beside those of the schedule that is extended, which does not mind them.
_BEGUN, _BEGUN_FROM, _LR_AT_START = "swa_begun", "swa_begun_from", "swa_lr_at_start"
_PHASE = "swa_phase"


class SWAScheduler(FairseqLRScheduler):
    """A schedule of fairseq up to ``--swa-start``, and the phase of averaging after it.

    Up to the start, and without --swa-lr for ever, the learning rate is that of the schedule that
    it wraps. From the start on it is --swa-lr, reached by annealing, or cycles that end at it. It
    also says which weights enter the average, which is kept elsewhere: `averages`.

    Args:
        cfg: options of the base schedule and a `SWAConfig`, flat.
        optimizer: fairseq's.

    Attributes:
        begun: number of updates at which averaging began; None before.
        attended: whether a trainer asks `averages`; without one `step_begin_epoch` refuses.

    Raises:
        ValueError: for an option out of range.
    """

    base_class: Type[FairseqLRScheduler]
    base_name: str

    def __init__(self, cfg: Any, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        check_swa_config(cfg)
        self.base = self.base_class(cfg, optimizer)
        self.start = parse_start(cfg)
        self.every = parse_every(cfg)
        self.begun: Optional[int] = None
        self._begun_from: Optional[str] = None  # the start that was asked for when it began
        self.attended = False
        self._lr_at_start = 0.0
        self._epochs = 0

    def averages(self, update: int, epoch: int, end_of_epoch: bool) -> bool:
        """Whether the weights of this moment enter the average.

        Args:
            update: number of updates done.
            epoch: that is being trained, from 1.
            end_of_epoch: whether the last of these updates was the last of its epoch.
        """
        self._epochs = epoch if end_of_epoch else epoch - 1
        self._begin_if_due(update)
        if self.begun is None:
            return False
        return end_of_epoch if self.every is None else (update - self.begun) % self.every == 0

    def describe(self) -> str:
        """One line for the log: what will be done, with its values."""
        cfg = self.cfg
        mean = "uniform mean" if cfg.swa_decay is None else f"exponential, decay {cfg.swa_decay:g}"
        parts = [mean, "every epoch" if self.every is None else f"every {self.every} update(s)"]
        if cfg.swa_lr is None:
            parts.append(f"learning rate of {self.base_name} throughout")
            if self.base_name == "reduce_lr_on_plateau":
                parts.append("which goes by the validation loss of the average once there is one")
        elif cfg.swa_cycle_length is not None:
            high = f"{cfg.swa_cycle_lr:g}" if cfg.swa_cycle_lr else "the schedule's"
            cycles = f"cycles of {cfg.swa_cycle_length} updates"
            parts.append(f"learning rate in {cycles} from {high} to {cfg.swa_lr:g}")
        else:
            parts.append(
                f"learning rate {cfg.swa_lr:g} after {cfg.swa_anneal} updates of annealing"
            )
        if cfg.swa_device == "cpu":
            parts.append("kept on the CPU")
        return f"average of weights from {self.start} on: " + ", ".join(parts)

    def _begin_if_due(self, update: int) -> None:
        if self.begun is not None:
            return
        if self.start.updates is not None:
            due = update >= self.start.updates
        else:
            due = self._epochs >= (self.start.epochs or 0)
        if due:
            self.begun, self._lr_at_start = update, self.base.step_update(update)
            self._begun_from = str(self.start)
            cfg, rate = self.cfg, self._lr_at_start
            if cfg.swa_cycle_length and cfg.swa_cycle_lr is None and rate < cfg.swa_lr:
                logger.warning(
                    f"--swa-lr {cfg.swa_lr:g} is above the schedule's rate at update {update}, "
                    f"{rate:g}, from which every cycle is to fall: the rate rises in the cycles; "
                    "give --swa-cycle-lr, or a lower --swa-lr"
                )

    def _rate(self, step: int) -> float:
        """Learning rate after ``step`` updates of the averaging phase."""
        cfg = self.cfg
        if cfg.swa_cycle_length is not None:
            high = self._lr_at_start if cfg.swa_cycle_lr is None else cfg.swa_cycle_lr
            return cyclical_rate(high, cfg.swa_lr, step, cfg.swa_cycle_length)
        strategy = str(cfg.swa_anneal_strategy)
        return annealed_rate(self._lr_at_start, cfg.swa_lr, step, cfg.swa_anneal, strategy)

    def _phase(self) -> Dict[str, str]:
        """The options, beside the start, that say what enters the average and at which rates."""
        cfg = self.cfg
        values = {
            "--swa-every": cfg.swa_every or 1,
            "--swa-decay": cfg.swa_decay,
            "--swa-lr": cfg.swa_lr,
            "--swa-cycle-length": cfg.swa_cycle_length,
            "--swa-cycle-lr": cfg.swa_cycle_lr,
        }
        return {option: "none" if v is None else str(v).strip() for option, v in values.items()}

    # fairseq's interface

    def step_begin_epoch(self, epoch: int) -> float:
        """fairseq's; refuses where nothing would be averaged.

        Raises:
            RuntimeError: if no trainer asks what to average.
        """
        if not self.attended:
            raise RuntimeError(
                f"--lr-scheduler {getattr(self.cfg, '_name', 'swa_*')}: the average of the weights "
                "is kept by deltasam_fairseq's trainer, which is not in place: start the run with "
                "fairseq-train or fairseq-hydra-train and --user-dir deltasam_fairseq"
            )
        self._epochs = epoch - 1
        self.base.step_begin_epoch(epoch)
        return self.optimizer.get_lr()

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        self.base.step(epoch, val_loss)
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        self._begin_if_due(num_updates)
        if self.begun is None or self.cfg.swa_lr is None:
            return self.base.step_update(num_updates)
        self.optimizer.set_lr(self._rate(num_updates - self.begun))
        return self.optimizer.get_lr()

    def state_dict(self) -> Dict[str, Any]:
        """The base schedule's, which can read it too, and where averaging began."""
        own = {
            _BEGUN: self.begun,
            _BEGUN_FROM: self._begun_from,
            _LR_AT_START: self._lr_at_start,
            _PHASE: self._phase(),
        }
        return {**self.base.state_dict(), **own}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on as the run that was saved; says so where its averaging began with other options."""
        self.base.load_state_dict(state_dict)
        self.begun = state_dict.get(_BEGUN)
        self._begun_from = state_dict.get(_BEGUN_FROM)
        if self._begun_from not in (None, str(self.start)):
            logger.warning(
                f"--swa-start {self.cfg.swa_start}, that is {self.start}, comes too late: the run "
                f"that is resumed began to average at update {self.begun}, and that goes on; to "
                "start again, give --reset-lr-scheduler"
            )
        self._lr_at_start = state_dict.get(_LR_AT_START, 0.0)
        saved, now = state_dict.get(_PHASE) or {}, self._phase()
        different = [option for option in now if saved.get(option, now[option]) != now[option]]
        if self.begun is not None and different:
            changes = ", ".join(f"{o} {now[o]} instead of {saved[o]}" for o in different)
            logger.warning(
                f"{changes}: the average of the run that is resumed goes on, from here on with the "
                "new values; to start again, give --reset-lr-scheduler"
            )


def _updates_of(epochs: int, per_epoch: Sequence[int]) -> int:
    """Number of updates in the first so many epochs; the last of ``per_epoch`` goes on."""
    return sum(per_epoch[:epochs]) + per_epoch[-1] * max(epochs - len(per_epoch), 0)


def _first_end_of_epoch(update: int, per_epoch: Sequence[int]) -> float:
    """Number of updates at the first end of an epoch that is not before ``update``."""
    done = 0
    for updates in per_epoch:
        done += updates
        if done >= max(update, 1):
            return done
    length = per_epoch[-1]
    return done - (done - update) // length * length if length else math.inf


def check_start(
    scheduler: SWAScheduler, per_epoch: Sequence[int], max_update: int, max_epoch: int
) -> None:
    """Check against the data that a run averages anything at all.

    Args:
        scheduler: of the run.
        per_epoch: numbers of updates in the first epochs, at least one; the last holds from there
            on.
        max_update, max_epoch: of the run, 0 for none.

    Raises:
        ValueError: naming the options and how long the run is.
    """
    if not any(per_epoch):
        raise ValueError(
            "--skip-remainder-batch: without its last batch an epoch has fewer batches than "
            "--update-freq, so that no update is ever made and there is nothing to average; give a "
            "smaller --update-freq or omit --skip-remainder-batch"
        )
    end = max_update if max_update > 0 else math.inf
    if max_epoch > 0:
        end = min(end, _updates_of(max_epoch, per_epoch))
    start = scheduler.start.updates
    if start is None:
        start = _updates_of(scheduler.start.epochs or 0, per_epoch)
    if scheduler.every is None:
        first = _first_end_of_epoch(start, per_epoch)
        option = f"--swa-every epoch with --swa-start {start} updates"
    else:
        first = start or scheduler.every
        option = f"--swa-start {scheduler.cfg.swa_start}"
    if first > end:
        raise ValueError(
            f"{option}: the first weights would be averaged after update {first}, but the run ends "
            f"after update {end}, with {per_epoch[0]} updates in an epoch; give an earlier "
            "--swa-start, a smaller --swa-every or --swa-cycle-length, or a longer run"
        )
