"""Options of weight averaging, as a fairseq dataclass that checks itself."""

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from deltasam_fairseq.algorithms import STRATEGIES
from deltasam_fairseq.options import check_options, option, require


@dataclass
class SWAConfig(FairseqDataclass):
    """What every swa_* schedule asks for beside the options of the schedule that it extends."""

    swa_start: str = field(
        default="0.5",
        metadata={
            "help": "when averaging begins: a number of updates (1000); a number of whole epochs "
            "(2ep); or a share of training with a point, between 0 and 1 (0.5), of --max-update, "
            "or without one of --max-epoch, rounded down to whole epochs. The weights at this "
            "point are the first in the average. Default 0.5. Izmailov et al.: 0.75; Lu et al., "
            "fine-tuning: 0.5 and earlier"
        },
    )
    swa_every: Optional[str] = field(
        default=None,
        metadata={
            "help": "how often weights enter the average: every so many updates, at least 1, or "
            "'epoch' for the end of every epoch. Default 1 (Lu et al.: steps; Izmailov et al.: "
            "epoch); with --swa-cycle-length the end of every cycle"
        },
    )
    swa_decay: Optional[float] = option(
        None,
        "exponential average with this decay, such as 0.999, instead of the uniform "
        "mean (default), which it is for the first 1 / (1 - decay) weights",
        remedy="such as 0.999; omit it for the uniform mean",
        above=0,
        below=1,
    )
    swa_lr: Optional[float] = option(
        None,
        "constant learning rate after --swa-start; with --swa-cycle-length "
        "the lowest of a cycle. Default: the schedule goes on as it would without averaging. "
        "Lu et al.: a high constant rate, such as that of the peak",
        remedy="omit it for that of the schedule",
        above=0,
    )
    swa_anneal: int = option(
        0,
        "updates in which the learning rate goes from the schedule's to --swa-lr; 0: at once",
        remedy="it is a number of updates",
        at_least=0,
    )
    swa_anneal_strategy: ChoiceEnum(list(STRATEGIES)) = field(  # type: ignore[valid-type]
        default="cos",
        metadata={"help": "the way of --swa-anneal, as in torch's SWALR: cos (default) or linear"},
    )
    swa_cycle_length: Optional[int] = option(
        None,
        "instead of a constant rate, cycles of this many updates, in which "
        " the rate falls from --swa-cycle-lr to --swa-lr; the weights at the end of "
        "every cycle enter the average",
        remedy="it is a number of updates; omit it for a constant rate",
        at_least=1,
    )
    swa_cycle_lr: Optional[float] = option(
        None,
        "learning rate from which every cycle falls, at least --swa-lr. Default: the "
        "schedule's at --swa-start",
        remedy="omit it for that of the schedule",
        above=0,
    )
    swa_device: ChoiceEnum(["model", "cpu"]) = field(  # type: ignore[valid-type]
        default="model",
        metadata={
            "help": "where the float32 average is kept: with the model (default), or on the CPU, "
            "which costs a transfer of the weights each time that they enter it"
        },
    )
    swa_validate_both: bool = field(
        default=False,
        metadata={
            "help": "validate the weights themselves too, logged as valid_raw; they have no part "
            "in the choice of the best checkpoint"
        },
    )
    max_update: int = II("optimization.max_update")
    max_epoch: int = II("optimization.max_epoch")


class Start(NamedTuple):
    """When averaging begins: after so many updates, or after so many whole epochs."""

    updates: Optional[int] = None
    epochs: Optional[int] = None

    def __str__(self) -> str:
        if self.updates is not None:
            return f"update {self.updates}"
        return f"the end of epoch {self.epochs}" if self.epochs else "the first update"


def parse_start(cfg: Any) -> Start:
    """The start that ``--swa-start`` means in a run of this length.

    Raises:
        UsageError: for text that is none, a share of an unknown length, a start beyond the end.
    """
    text = str(cfg.swa_start).strip()
    max_update, max_epoch = int(cfg.max_update or 0), int(cfg.max_epoch or 0)
    if re.fullmatch(r"\d+", text):
        start = Start(updates=int(text))
    elif re.fullmatch(r"\d+ep", text):
        start = Start(epochs=int(text[:-2]))
    else:
        require(
            re.fullmatch(r"0?\.\d+", text) is not None and float(text) > 0,
            "swa_start",
            text,
            "give a number of updates such as 1000, of epochs such as 2ep, or a share of training "
            "above 0 and below 1 such as 0.5",
        )
        require(
            max_update > 0 or max_epoch > 0,
            "swa_start",
            text,
            "a share of training, whose length is not known; set --max-update or --max-epoch, or "
            "give updates such as 1000 or epochs such as 2ep",
        )
        if max_update > 0:
            start = Start(updates=math.ceil(Fraction(text) * max_update))
        else:
            start = Start(epochs=math.floor(Fraction(text) * max_epoch))
    for asked, end, limit in (
        (start.updates, max_update, "--max-update"),
        (start.epochs, max_epoch, "--max-epoch"),
    ):
        require(
            asked is None or end <= 0 or asked <= end,
            "swa_start",
            text,
            f"averaging would begin after the run has ended, {limit} {end}; give an earlier "
            "start, such as 0.5",
        )
    return start


def parse_every(cfg: Any) -> Optional[int]:
    """Updates between two weights that enter the average; None for the end of every epoch.

    Raises:
        UsageError: for text that is neither.
    """
    if cfg.swa_every is None:
        return cfg.swa_cycle_length or 1
    text = str(cfg.swa_every).strip()
    if text == "epoch":
        return None
    require(
        re.fullmatch(r"\d+", text) is not None and int(text) >= 1,
        "swa_every",
        text,
        "must be a number of updates, at least 1, or 'epoch'",
    )
    return int(text)


def check_swa_config(cfg: Any) -> None:
    """Check the values of a `SWAConfig`, resolved (dataclass or DictConfig).

    Raises:
        UsageError: naming the option, its value, what is allowed and what to do.
    """
    parse_start(cfg)
    parse_every(cfg)
    check_options(cfg, SWAConfig)
    anneal, length = cfg.swa_anneal, cfg.swa_cycle_length
    require(
        not anneal or (cfg.swa_lr is not None and length is None),
        "swa_anneal",
        anneal,
        "has a meaning only on the way to a constant --swa-lr; "
        + ("omit it or --swa-cycle-length" if length is not None else "give --swa-lr too"),
    )
    require(
        length is None or cfg.swa_lr is not None,
        "swa_cycle_length",
        length,
        "needs --swa-lr, the rate at the end of a cycle",
    )
    require(
        length is None or cfg.swa_every is None,
        "swa_every",
        cfg.swa_every,
        "with --swa-cycle-length the weights at the end of every cycle are averaged; leave "
        "--swa-every out",
    )
    require(
        cfg.swa_cycle_lr is None or length is not None,
        "swa_cycle_lr",
        cfg.swa_cycle_lr,
        "has a meaning only with --swa-cycle-length; give it too",
    )
    require(
        cfg.swa_cycle_lr is None or cfg.swa_cycle_lr >= cfg.swa_lr,
        "swa_cycle_lr",
        cfg.swa_cycle_lr,
        f"a cycle falls from it to --swa-lr {cfg.swa_lr}; give a higher one, or a lower --swa-lr",
    )
