"""Options of SAM and delta-SAM, as fairseq dataclasses that check themselves."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

DEFAULT_ETA = 0.01
SCOPES = ChoiceEnum(["global", "rank"])


@dataclass
class SAMConfig(FairseqDataclass):
    """What every sharpness-aware optimizer asks for beside its base optimizer's options."""

    sam_rho: float = field(
        default=0.05,
        metadata={
            "help": "radius of the SAM perturbation, L2 norm in weight space, at least 0 "
            "(0: the base optimizer itself), default 0.05. delta-SAM paper, GLUE: 0.02 for "
            "RoBERTa large (SST-2 0.05, STS-B 0.01), 0.05 for BERT base (STS-B 0.01), searched in "
            "{0.01, 0.02, 0.05}; with --sam-adaptive about ten times that and more (0.5 to 2)"
        },
    )
    sam_adaptive: bool = field(
        default=False,
        metadata={
            "help": "ASAM (Kwon et al. 2021): the perturbation of a weight is relative to its "
            "size, rho T^2 g / ||T g|| with T = |w| + eta"
        },
    )
    sam_eta: float = field(
        default=DEFAULT_ETA,
        metadata={
            "help": "eta of --sam-adaptive, added to |w| so that weights at zero can move; "
            "unit of a weight, at least 0, default 0.01 as in the paper"
        },
    )
    sam_start_update: int = field(
        default=0,
        metadata={
            "help": "number of updates that the base optimizer makes alone before the "
            "perturbation begins, at least 0, default 0"
        },
    )
    sam_scope: SCOPES = field(  # type: ignore[valid-type]
        default="global",
        metadata={
            "help": "what a perturbation is computed from: the global batch (default), the same on "
            "every data-parallel rank; or each rank's own shard of it (m-sharpness, Foret et al.), "
            "without communication in the ascent. The same with one process"
        },
    )
    sam_ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "share of the sentences of every micro-batch that the ascent's gradient is "
            "computed from, above 0, at most 1 (default: all; Bahri et al. 2021: 0.25). SAM draws "
            "them at random, delta-SAM keeps the most unguarded ones"
        },
    )
    sam_every: int = field(
        default=1,
        metadata={
            "help": "only every so many updates, counted from --sam-start-update, are perturbed; "
            "the others are the base optimizer's; at least 1, default 1"
        },
    )
    sam_only: Optional[str] = field(
        default=None,
        metadata={
            "help": "perturb only the weights in whose name this regular expression is found, for "
            "example layer_norm (SAM-ON, Mueller et al. 2023, who take a larger rho for it); "
            "default: all weights"
        },
    )


@dataclass
class DeltaSAMConfig(SAMConfig):
    """What delta-SAM asks for beside SAM's options."""

    delta_sam_beta: float = field(
        default=3.0,
        metadata={
            "help": "strength of delta-SAM's reweighting of sentences in the ascent, at least 0 "
            "(0: plain SAM), default 3. Paper, GLUE: 3 for the large tasks, RTE 5, MRPC 5, "
            "STS-B 10, CoLA 20 with RoBERTa large; RTE 70, MRPC, CoLA and STS-B 10 with BERT base; "
            "searched in {3, 5, 10, 20, 50, 70}"
        },
    )
    delta_sam_probe_radius: Optional[float] = field(
        default=None,
        metadata={
            "help": "radius of delta-SAM's random probe, L2 norm in weight space, above 0. "
            "Default: rho in float32; in half precision 0.35 times the cube root of the unit "
            "roundoff times the norm of the weights, because a probe of radius rho would be "
            "rounded away (the weights of the sentences do not depend on it)"
        },
    )


def _require(condition: bool, option: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"--{option.replace('_', '-')} {value}: {remedy}")


def _check_pattern(pattern: Optional[str]) -> None:
    if pattern is None:
        return
    example = "layer_norm perturbs all layer normalisations"
    _require(bool(pattern), "sam_only", "''", f"is empty; leave it out to perturb all; {example}")
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(
            f"--sam-only {pattern}: is no regular expression ({e}); put \\ before a character that "
            f"is meant as it is; {example}"
        ) from e


def check_optimizer_config(cfg: Any) -> None:
    """Check the values of a `SAMConfig` or `DeltaSAMConfig` (dataclass, DictConfig, Namespace).

    Raises:
        ValueError: naming the option, its value, what is allowed and what to do.
    """
    for option, help_ in (
        ("sam_rho", "must be finite and at least 0; 0.02 to 0.05 suits most fine-tuning"),
        ("sam_eta", f"must be finite and at least 0; the paper uses {DEFAULT_ETA}"),
        ("delta_sam_beta", "must be finite and at least 0; 3 is the paper's most common value"),
    ):
        value = getattr(cfg, option, 0.0)
        valid = value is not None and math.isfinite(value) and value >= 0
        _require(valid, option, value, help_)
    radius = getattr(cfg, "delta_sam_probe_radius", None)
    _require(
        radius is None or (math.isfinite(radius) and radius > 0),
        "delta_sam_probe_radius",
        radius,
        "must be finite and above 0; leave it out for the rule",
    )
    start = cfg.sam_start_update
    _require(start >= 0, "sam_start_update", start, "must be at least 0, a number of updates")
    fraction, every = cfg.sam_ascent_fraction, cfg.sam_every
    _require(
        0 < fraction <= 1,
        "sam_ascent_fraction",
        fraction,
        "must be above 0 and at most 1, a share of the batch; 0.25 is Bahri et al.'s",
    )
    _require(every >= 1, "sam_every", every, "must be at least 1; 1 perturbs every update")
    _check_pattern(cfg.sam_only)
    _require(
        cfg.sam_adaptive or cfg.sam_eta == DEFAULT_ETA,
        "sam_eta",
        cfg.sam_eta,
        "has a meaning only for ASAM; add --sam-adaptive or drop --sam-eta",
    )
