"""Options of SAM and delta-SAM, as fairseq dataclasses that check themselves."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from deltasam_fairseq.options import UsageError, check_options, option, require

DEFAULT_ETA = 0.01
SCOPES = ChoiceEnum(["global", "rank"])
RADII = ChoiceEnum(["rho", "trust_region", "trust_region_theta"])
DEFAULT_SIGMA = 1e-5
MASKS = ChoiceEnum(["none", "fisher"])
DEFAULT_MASK_SHARE, DEFAULT_MASK_EVERY = 0.1, 100
RHO_SCHEDULES = ChoiceEnum(["constant", "lr", "warmup"])
# Of --delta-sam-weights; the option that scales them, 0 for SAM.
_STRENGTHS = {"linear": "delta_sam_beta", "gibbs": "delta_sam_lambda"}
WEIGHTS = ChoiceEnum(list(_STRENGTHS))


@dataclass
class SAMConfig(FairseqDataclass):
    """What every sharpness-aware optimizer asks for beside its base optimizer's options."""

    sam_rho: float = option(
        0.05,
        "radius of the SAM perturbation, L2 norm in weight space; 0: the base "
        "optimizer itself. delta-SAM paper, GLUE: 0.02 for "
        "RoBERTa large (SST-2 0.05, STS-B 0.01), 0.05 for BERT base (STS-B 0.01), searched in "
        "{0.01, 0.02, 0.05}; with --sam-adaptive about ten times that and more (0.5 to 2)",
        remedy="0.02 to 0.05 suits most fine-tuning",
        at_least=0,
    )
    sam_adaptive: bool = field(
        default=False,
        metadata={
            "help": "ASAM (Kwon et al. 2021): the perturbation of a weight is relative to its "
            "size, rho T^2 g / ||T g|| with T = |w| + eta"
        },
    )
    sam_eta: float = option(
        DEFAULT_ETA,
        "eta of --sam-adaptive, added to |w| so that weights at zero can move; "
        "unit of a weight. Paper: 0.01",
        remedy=f"the paper uses {DEFAULT_ETA}",
        at_least=0,
    )
    sam_start_update: int = option(
        0,
        "number of updates that the base optimizer makes alone before the perturbation begins",
        remedy="it is a number of updates",
        at_least=0,
    )
    sam_scope: SCOPES = field(  # type: ignore[valid-type]
        default="global",
        metadata={
            "help": "what a perturbation is computed from: the global batch (default), the same on "
            "every data-parallel rank; or each rank's own shard of it (m-sharpness, Foret et al.), "
            "without communication in the ascent. The same with one process"
        },
    )
    sam_micro: Optional[int] = option(
        None,
        "number of sentences in a group that has a perturbation of its own (m-sharpness, Foret et "
        "al. 2020, section 4.1); 1: per-instance perturbation (delta-SAM paper, Eq. 2). Default: "
        "one group, SAM. The arithmetic is SAM's, a group at a time; a group that spans ranks "
        "costs one more reduction of gradients, none does where it divides every mini-batch",
        remedy="1 perturbs every sentence on its own; omit it for SAM",
        at_least=1,
    )
    sam_ascent_fraction: float = option(
        1.0,
        "share of the sentences of every micro-batch that the ascent's gradient is "
        "computed from; Bahri et al. 2021: 0.25. SAM draws "
        "them at random, delta-SAM keeps the most unguarded ones",
        remedy="it is a share of the batch; 0.25 is Bahri et al.'s",
        above=0,
        at_most=1,
    )
    sam_every: int = option(
        1,
        "only every so many updates, counted from --sam-start-update, are perturbed; "
        "the others are the base optimizer's",
        remedy="1 perturbs every update",
        at_least=1,
    )
    sam_only: Optional[str] = field(
        default=None,
        metadata={
            "help": "perturb only the weights in whose name this regular expression is found, for "
            "example layer_norm (SAM-ON, Mueller et al. 2023, who take a larger rho for it); "
            "default: all weights"
        },
    )
    sam_rho_schedule: RHO_SCHEDULES = field(  # type: ignore[valid-type]
        default="constant",
        metadata={
            "help": "rho of an update: constant (default); lr: between --sam-rho-min and --sam-rho "
            "as the learning rate is between --sam-rho-lr-min and --sam-rho-lr-max (GSAM, Zhuang "
            "et al. 2022); warmup: linear from --sam-rho-min to --sam-rho over "
            "--sam-rho-warmup-updates"
        },
    )
    sam_rho_min: float = option(
        0.0,
        "smallest rho of --sam-rho-schedule lr and warmup, L2 norm in weight space; GSAM's public "
        "code: a sixth of --sam-rho",
        remedy="0 begins as the base optimizer",
        at_least=0,
    )
    sam_rho_lr_min: float = option(
        0.0,
        "learning rate at which --sam-rho-schedule lr has --sam-rho-min",
        remedy="the smallest of the run",
        at_least=0,
    )
    sam_rho_lr_max: Optional[float] = option(
        None,
        "learning rate at which --sam-rho-schedule lr has --sam-rho. Default: the largest of --lr",
        remedy="omit it for the largest of --lr",
        above=0,
    )
    sam_rho_warmup_updates: Optional[int] = option(
        None,
        "updates from --sam-start-update on in which --sam-rho-schedule warmup reaches --sam-rho",
        remedy="it is a number of updates, a tenth of the run for example",
        at_least=1,
    )
    sam_gsam_alpha: float = option(
        0.0,
        "GSAM (Zhuang et al. 2022): step along g_p - alpha g_perp, where g_p is the gradient at "
        "w + eps* and g_perp the part of the gradient at w that is orthogonal to it; no unit. "
        "0: SAM. GSAM's public code for ViT: 0.6, with --sam-rho-schedule lr",
        remedy="0.1 to 0.6 are usual",
        at_least=0,
    )
    sam_radius: RADII = field(  # type: ignore[valid-type]
        default="rho",
        metadata={
            "help": "rho (default): --sam-rho, or its schedule; "
            "trust_region (TRAM-x, Sherborne et al. 2024): eps* = d w^2 g / ||w g||, with "
            "d, in place of rho, the mean KL divergence of the outputs of noised inputs from those "
            "of clean ones, for models with word embeddings; trust_region_theta (TRAM-theta): of "
            "those at the weights before the last update. For the criterions of --sam-functional"
        },
    )
    sam_trust_sigma: float = option(
        DEFAULT_SIGMA,
        "standard deviation of the noise of --sam-radius trust_region on word embeddings, in units "
        "of their entries; R3F, whose noise it is: 1e-5",
        remedy=f"R3F uses {DEFAULT_SIGMA:g}",
        at_least=0,
    )
    sam_mask: MASKS = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "none (default): all weights move; "
            "fisher (FSAM, Zhong et al. 2022): the ascent moves only the weights with the "
            "largest squared gradients: those of single sentences where the criterion has their "
            "losses, else of the batch; rho is the length of what moves"
        },
    )
    sam_mask_share: float = option(
        DEFAULT_MASK_SHARE,
        "share of the weights that --sam-mask fisher lets move",
        remedy="it is a share of the weights",
        above=0,
        at_most=1,
    )
    sam_mask_every: int = option(
        DEFAULT_MASK_EVERY,
        "updates after which --sam-mask fisher is renewed, by as many backward passes as the batch "
        "has sentences",
        remedy="1 renews the mask in every update",
        at_least=1,
    )
    sam_functional: bool = field(
        default=False,
        metadata={
            "help": "functional SAM (Singh et al. 2025): the gradient at w + eps* keeps the "
            "gradients of the outputs that were found at w. For sentence_prediction, plain, "
            "sentence_ranking, masked_lm, cross_entropy, label_smoothed_cross_entropy, distill, "
            "seq2seq_distill, span_prediction"
        },
    )


@dataclass
class DeltaSAMConfig(SAMConfig):
    """What delta-SAM asks for beside SAM's options."""

    delta_sam_weights: WEIGHTS = field(  # type: ignore[valid-type]
        default="linear",
        metadata={
            "help": "how a sentence's weight in the ascent rises with the change of its loss at a "
            "random probe: linear, scaled by --delta-sam-beta (delta-SAM, Eq. 4 to 6; default), or "
            "gibbs, a softmax scaled by --delta-sam-lambda (RW-SAM, Luo et al. 2025)"
        },
    )
    delta_sam_beta: float = option(
        3.0,
        "strength of delta-SAM's linear reweighting of sentences in the ascent; 0: plain SAM. "
        "Paper, GLUE: 3 for the large tasks, RTE 5, MRPC 5, "
        "STS-B 10, CoLA 20 with RoBERTa large; RTE 70, MRPC, CoLA and STS-B 10 with BERT base; "
        "searched in {3, 5, 10, 20, 50, 70}",
        remedy="3 is the paper's most common value",
        at_least=0,
    )
    delta_sam_lambda: float = option(
        2.0,
        "strength of --delta-sam-weights gibbs: the most sensitive sentence of the batch weighs "
        "exp(lambda) times as much in the ascent as one that is not sensitive; 0: plain SAM. "
        "2 leaves about 0.7 of the sentences in effect, as many as linear weights do, 5 about 0.2",
        remedy="2 leaves about 0.7 of the sentences in effect",
        at_least=0,
    )
    delta_sam_probe_radius: Optional[float] = option(
        None,
        "radius of delta-SAM's random probe, L2 norm in weight space. "
        "Default: rho in float32; in half precision 0.35 times the cube root of the unit "
        "roundoff times the norm of the weights, because a probe of radius rho would be "
        "rounded away (the weights of the sentences do not depend on it)",
        remedy="omit it for the rule",
        above=0,
    )


def _check_pattern(pattern: Optional[str]) -> None:
    if pattern is None:
        return
    example = "layer_norm perturbs all layer normalisations"
    require(bool(pattern), "sam_only", "''", f"is empty; omit it to perturb all; {example}")
    try:
        re.compile(pattern)
    except re.error as e:
        raise UsageError(
            f"--sam-only {pattern}: is no regular expression ({e}); put \\ before a character that "
            f"is meant as it is; {example}"
        ) from e


class Conflict(NamedTuple):
    """Two options that cannot be combined.

    Attributes:
        option, other: names of their fields.
        why: what goes wrong, and what to do.
    """

    option: str
    other: str
    why: str


_WHOLE_GRADIENT = (
    "GSAM needs the gradient of the whole batch's loss at w, for all weights; drop one"
)
_NO_RHO = "a trust region takes the place of rho; drop one"
_GROUPS = "the groups of --sam-micro have gradients and perturbations of their own; drop one"
CONFLICTS: Tuple[Conflict, ...] = (
    Conflict("delta_sam_weights", "sam_micro", f"{_GROUPS}, or use --optimizer sam_*"),
    Conflict("sam_micro", "sam_ascent_fraction", _GROUPS),
    Conflict(
        "sam_micro",
        "sam_scope",
        "both say which sentences share a perturbation: M of --sam-micro, or a rank's; drop one",
    ),
    Conflict("sam_micro", "sam_gsam_alpha", _GROUPS),
    Conflict("sam_micro", "sam_functional", _GROUPS),
    Conflict("sam_micro", "sam_mask", _GROUPS),
    Conflict("sam_micro", "sam_radius", _GROUPS),
    Conflict("delta_sam_weights", "sam_gsam_alpha", f"{_WHOLE_GRADIENT}, or use --optimizer sam_*"),
    Conflict("sam_gsam_alpha", "sam_only", _WHOLE_GRADIENT),
    Conflict("sam_gsam_alpha", "sam_ascent_fraction", _WHOLE_GRADIENT),
    Conflict("sam_gsam_alpha", "sam_scope", _WHOLE_GRADIENT),
    Conflict("sam_radius", "sam_rho", _NO_RHO),
    Conflict("sam_radius", "sam_rho_schedule", _NO_RHO),
    Conflict("sam_radius", "sam_adaptive", "a trust region is adaptive already; drop one"),
    Conflict(
        "sam_radius",
        "sam_ascent_fraction",
        "a trust region needs the outputs of all sentences at w; drop one",
    ),
    Conflict("sam_mask", "sam_scope", "each rank would have a mask of its own; drop one"),
    Conflict("sam_functional", "sam_gsam_alpha", "both change the gradient of the step; drop one"),
    Conflict(
        "sam_functional",
        "sam_ascent_fraction",
        "functional SAM needs the outputs of all sentences at w; drop one",
    ),
)


class Need(NamedTuple):
    """An option that has a meaning only where another has a value.

    Attributes:
        option: name of its field.
        other, values: the other field, and what it must be.
        remedy: for whom it has a meaning, and what to do.
    """

    option: str
    other: str
    values: Tuple[Any, ...]
    remedy: str


_FOR_MASK = "has a meaning only for a mask; add --sam-mask fisher or drop it"
_FOR_SCHEDULE = "has a meaning only for a rho that changes; add --sam-rho-schedule {} or drop it"
NEEDS = (
    Need(
        "delta_sam_lambda",
        "delta_sam_weights",
        ("gibbs",),
        "has a meaning only for RW-SAM; add --delta-sam-weights gibbs or drop --delta-sam-lambda",
    ),
    Need(
        "sam_eta",
        "sam_adaptive",
        (True,),
        "has a meaning only for ASAM; add --sam-adaptive or drop --sam-eta",
    ),
    Need(
        "sam_trust_sigma",
        "sam_radius",
        ("trust_region",),
        "has a meaning only for a trust region; add --sam-radius trust_region or drop it",
    ),
    Need("sam_mask_share", "sam_mask", ("fisher",), _FOR_MASK),
    Need("sam_mask_every", "sam_mask", ("fisher",), _FOR_MASK),
    Need("sam_rho_min", "sam_rho_schedule", ("lr", "warmup"), _FOR_SCHEDULE.format("lr or warmup")),
    Need("sam_rho_lr_min", "sam_rho_schedule", ("lr",), _FOR_SCHEDULE.format("lr")),
    Need("sam_rho_lr_max", "sam_rho_schedule", ("lr",), _FOR_SCHEDULE.format("lr")),
    Need("sam_rho_warmup_updates", "sam_rho_schedule", ("warmup",), _FOR_SCHEDULE.format("warmup")),
)


def in_force(cfg: Any, option: str) -> bool:
    """Whether an option of the configuration, by its field's name, has another than its default."""
    if option == "delta_sam_weights":  # of delta-SAM's optimizers only, and on by default
        return weights_strength(cfg) > 0
    default = DeltaSAMConfig.__dataclass_fields__[option].default
    return bool(getattr(cfg, option, default) != default)


def weights_strength(cfg: Any) -> float:
    """Return what scales the weights of the sentences in the ascent; 0 where they are uniform.

    Args:
        cfg: options of an optimizer; those without --delta-sam-weights are SAM's.
    """
    option = _STRENGTHS.get(str(getattr(cfg, "delta_sam_weights", None)))
    return 0.0 if option is None else float(getattr(cfg, option))


def _as_given(cfg: Any, option: str) -> str:
    value = getattr(cfg, option)
    return f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}")


def check_optimizer_config(cfg: Any) -> None:
    """Check the values of a `SAMConfig` or `DeltaSAMConfig` (dataclass, DictConfig, Namespace).

    Raises:
        UsageError: naming the option, its value, what is allowed and what to do.
    """
    check_options(cfg, DeltaSAMConfig)
    _check_pattern(cfg.sam_only)
    for need in NEEDS:
        if in_force(cfg, need.option) and getattr(cfg, need.other) not in need.values:
            raise UsageError(f"{_as_given(cfg, need.option)}: {need.remedy}")
    if str(getattr(cfg, "delta_sam_weights", "linear")) == "gibbs":
        remedy = "scales linear weights; --delta-sam-lambda scales gibbs, drop --delta-sam-beta"
        require(not in_force(cfg, "delta_sam_beta"), "delta_sam_beta", cfg.delta_sam_beta, remedy)
    for one, other, why in CONFLICTS:
        if in_force(cfg, one) and in_force(cfg, other):
            both = f"{_as_given(cfg, one)} cannot be combined with {_as_given(cfg, other)}"
            raise UsageError(f"{both}: {why}")
    if cfg.sam_rho_schedule == "warmup":
        given = cfg.sam_rho_warmup_updates is not None
        require(given, "sam_rho_schedule", "warmup", "give --sam-rho-warmup-updates too")
    if cfg.sam_rho_schedule != "constant":
        remedy = f"must be at most --sam-rho {cfg.sam_rho:g}, the largest; exchange the two"
        require(cfg.sam_rho_min <= cfg.sam_rho, "sam_rho_min", cfg.sam_rho_min, remedy)
    if cfg.sam_rho_lr_max is not None:
        remedy = f"must be below --sam-rho-lr-max {cfg.sam_rho_lr_max:g}; exchange the two"
        require(
            cfg.sam_rho_lr_min < cfg.sam_rho_lr_max, "sam_rho_lr_min", cfg.sam_rho_lr_min, remedy
        )
