"""Extend fairseq's Trainer by an average of the weights (--lr-scheduler swa_*).

The schedule decides when weights enter the average. Training never uses it: fairseq validates with
it and saves it as the model of every checkpoint. The same file holds the weights themselves, from
which a resumed run continues.
"""

import logging
import math
from typing import Any, Dict, List, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.lr_schedulers import SWAScheduler, check_start
from deltasam_fairseq.optim import masters_of
from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE, N
from deltasam_fairseq.trainer.weight_average import WeightAverage, raw_weights

logger = logging.getLogger(__name__)


class AveragingTrainer(Trainer):
    """Average weights if the learning-rate schedule is swa_*.

    With any other schedule it is fairseq's Trainer, except that it continues from the weights
    themselves if a checkpoint holds their average.

    Attributes:
        weight_average: None with any other schedule.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_average: Optional[WeightAverage] = None
        self._named: Dict[str, Parameter] = {}
        self._epoch_itr: Any = None
        self._seen_update = 0

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        self._named = self._trained_by_name()
        self.weight_average = None  # fairseq builds another when it resumes: free the first
        scheduler = self._lr_scheduler
        if not isinstance(scheduler, SWAScheduler):
            return
        scheduler.attended = True
        cfg = scheduler.cfg
        self.weight_average = WeightAverage(
            self._named, cfg.swa_decay, on_cpu=str(cfg.swa_device) == "cpu"
        )
        logger.info(scheduler.describe())
        modules = self.get_model().modules()
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in modules):
            logger.warning(
                "the model has batch normalisation: its running statistics are those of the "
                "weights themselves, not of their average; see docs/swa.md"
            )

    def _trained_by_name(self) -> Dict[str, Parameter]:
        """Return the trained parameters, also the criterion's; a shared one has one name."""
        named: Dict[Parameter, str] = {}
        for owner, module in (("model", self.get_model()), ("criterion", self.get_criterion())):
            for name, p in module.named_parameters():
                if p.requires_grad:
                    named.setdefault(p, f"{owner}.{name}")
        return {name: p for p, name in named.items()}

    def _raw(self) -> Dict[str, Tensor]:
        """Return the weights themselves by name; the masters of half-precision ones, if any."""
        masters = masters_of(self._optimizer) or {}
        return {name: masters.get(p, p.data) for name, p in self._named.items()}

    # Training

    def train_step(self, samples: List[Any], raise_oom: bool = False) -> Any:
        """Run fairseq's step; weights may enter the average unless it skipped the update."""
        self._seen_update = self.get_num_updates()
        stats = super().train_step(samples, raise_oom)
        average, scheduler, update = self.weight_average, self.lr_scheduler, self.get_num_updates()
        if average is None or update == self._seen_update:
            return stats
        self._seen_update = update  # once, also where fairseq re-enters here
        epoch = max(getattr(self._epoch_itr, "epoch", 1), 1)
        end_of_epoch = self._epoch_itr is not None and self._epoch_itr.end_of_epoch()
        if scheduler.averages(update, epoch, end_of_epoch):
            if average.n == 0:
                logger.info(f"averaging of weights begins: update {update}, epoch {epoch}")
            average.add(self._raw())
        if scheduler.begun is not None:
            metrics.log_scalar("swa_start", scheduler.begun, weight=0, priority=311)
            metrics.log_scalar("swa_n", average.n, weight=0, priority=310)
        return stats

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return fairseq's iterator; before training check that the run reaches --swa-start."""
        first, self._epoch_itr = (
            self._epoch_itr is None,
            super().get_train_iterator(*args, **kwargs),
        )
        scheduler = self.lr_scheduler
        known = type(self._epoch_itr) is iterators.EpochBatchIterator
        if not (isinstance(scheduler, SWAScheduler) and first and known):
            return self._epoch_itr
        if scheduler.begun is None or self.get_num_updates() == 0:  # not resumed in that phase
            if not self.task.has_sharded_data("train"):
                cfg = self.cfg.optimization
                ends = (cfg.max_update or 0, cfg.max_epoch or 0)
                check_start(scheduler, self._updates_per_epoch(), *ends)
        return self._epoch_itr

    def _updates_per_epoch(self) -> List[int]:
        """Return the numbers of updates of the first epochs, none skipped; the last one repeats."""
        cfg, batches = self.cfg.optimization, len(self._epoch_itr)
        if getattr(cfg, "skip_remainder_batch", False):
            # fairseq drops the last batch, full or not, and then the last incomplete group.
            return [max(batches - 1, 0) // freq for freq in cfg.update_freq]
        return [-(-batches // freq) for freq in cfg.update_freq]

    def valid_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run fairseq's step; log how many weights the validated average has."""
        if self.weight_average is not None and self.weight_average.is_in_force:
            metrics.log_scalar("swa_n", self.weight_average.n, weight=0, priority=310)
        return super().valid_step(*args, **kwargs)

    # Checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """Return fairseq's state with the average as the model, and what a resumed run needs."""
        average = self.weight_average
        if average is None:
            return super().state_dict()
        with average.raw():
            raw = self._raw()
        with average.in_force():
            state = super().state_dict()
            own = average.put_into(raw, state["model"], state["criterion"])
        if not self.cfg.checkpoint.no_save_optimizer_state:
            state["extra_state"][WEIGHT_AVERAGE] = own
        return state

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load as fairseq does; continue from the weights themselves and with their average.

        The average belongs to the schedule's phase: without the saved schedule it starts again.
        """
        extra_state = super().load_checkpoint(
            filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs
        )
        saved = (extra_state or {}).pop(WEIGHT_AVERAGE, None)
        if saved is None or reset_optimizer:
            return extra_state
        masters = masters_of(self.optimizer) or {}
        own = self._named
        with torch.no_grad():
            for name, value in raw_weights(saved, own).items():
                own[name].data.copy_(value)
                if own[name] in masters:
                    masters[own[name]].copy_(value)
        average, scheduler = self.weight_average, self.lr_scheduler
        if average is not None and not reset_lr_scheduler:
            average.load_state_dict(saved)
            logger.info(f"going on with an average of {average.n} weights")
        elif average is not None and saved[N]:
            logger.warning(
                f"{filename} holds an average of {saved[N]} weights; training goes on from the "
                "weights themselves and without it, as --reset-lr-scheduler is given: averaging "
                f"starts again from {scheduler.start} on"
            )
        elif saved[N]:
            logger.warning(
                f"{filename} holds an average of weights; training goes on from the weights "
                "themselves and without it, as --lr-scheduler is not swa_*. To train on from the "
                "average instead, give --reset-optimizer or --finetune-from-model"
            )
        return extra_state


def validate_average(
    validate: Any, cfg: Any, trainer: Any, task: Any, epoch_itr: Any, subsets: List[str]
) -> Any:
    """Validate the average; with --swa-validate-both then the weights too."""
    average = getattr(trainer, "weight_average", None)
    if average is None or average.n == 0:
        return validate(cfg, trainer, task, epoch_itr, subsets)
    with average.in_force():
        losses = validate(cfg, trainer, task, epoch_itr, subsets)
    if trainer.lr_scheduler.cfg.swa_validate_both:
        raw = [f"{subset}_raw" for subset in subsets]
        task.datasets.update({r: task.dataset(s) for r, s in zip(raw, subsets)})
        _without_best(validate, cfg, trainer, task, epoch_itr, raw)
    return losses


def warn_if_never_averaged(train: Any, cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
    """Train an epoch as fairseq does; warn if the run ends without an average."""
    losses, should_stop = train(cfg, trainer, task, epoch_itr)
    average = getattr(trainer, "weight_average", None)
    if average is None or average.n > 0:
        return losses, should_stop
    scheduler, optimization = trainer.lr_scheduler, cfg.optimization
    ends = (
        should_stop
        or epoch_itr.next_epoch_idx > (optimization.max_epoch or math.inf)
        or trainer.get_lr() <= optimization.stop_min_lr
    )
    if ends:
        logger.warning(
            f"nothing was averaged: the run ended after update {trainer.get_num_updates()}, "
            f"before the first weights entered (--swa-start {scheduler.cfg.swa_start}, that is "
            f"{scheduler.start}); the checkpoints hold the weights themselves"
        )
    return losses, should_stop


def _without_best(validate: Any, *args: Any) -> None:
    """Validate without choosing the best checkpoint or comparing with it in the log."""
    holder = checkpoint_utils.save_checkpoint
    best = vars(holder).pop("best", None)
    try:
        validate(*args)
    finally:
        if best is not None:
            holder.best = best
