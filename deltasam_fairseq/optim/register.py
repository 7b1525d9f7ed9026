"""Registers ``sam_X`` and ``delta_sam_X`` for every optimizer X that fairseq has."""

import argparse
import dataclasses
from typing import Any, List, Optional, Tuple, Type

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY, register_optimizer
from omegaconf import II

from deltasam_fairseq.optim.adam import AdamStepConfig
from deltasam_fairseq.optim.config import DeltaSAMConfig, SAMConfig
from deltasam_fairseq.optim.sharpness_aware import SharpnessAwareOptimizer

# composite builds further optimizers for parameter groups, each of which would perturb for
# itself; cpu_adam belongs to fully sharded training with offloaded weights.
NOT_WRAPPED = ("composite", "cpu_adam")


class _OnlyForDeltaSAM(argparse.Action):
    """Refuses delta-SAM's option on a plain SAM optimizer with a remedy, not as unknown."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.error(
            f"{option_string} {values}: plain SAM does not reweight; use --optimizer delta_sam_* "
            f"or drop {option_string}"
        )


class SAMOptimizer(SharpnessAwareOptimizer):
    """SAM: one perturbation along the gradient of the batch."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        super().add_args(parser)
        for field in dataclasses.fields(DeltaSAMConfig):
            if not field.name.startswith("delta_sam_"):
                continue
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                action=_OnlyForDeltaSAM,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


class DeltaSAMOptimizer(SharpnessAwareOptimizer):
    """delta-SAM: one perturbation along the gradient of the dynamically reweighted batch."""


def _fields_of_legacy_optimizer(cls: type) -> List[Tuple[str, type, Any]]:
    """Dataclass fields for the options of an optimizer that has only ``add_args``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if hasattr(cls, "add_args"):
        cls.add_args(parser)
    fields: List[Tuple[str, type, Any]] = []
    for action in parser._actions:
        if action.const is not None:  # store_true, store_false
            type_: Any = bool
        else:
            type_ = action.type if isinstance(action.type, type) else str
            if action.default is None:
                type_ = Optional[type_]
        metadata = {"help": action.help}
        if len(action.option_strings) > 1:
            metadata["argparse_alias"] = action.option_strings[-1]
        field = dataclasses.field(default=action.default, metadata=metadata)
        fields.append((action.dest, type_, field))
    fields.append(("lr", List[float], dataclasses.field(default=II("optimization.lr"))))
    return fields


def _config_of(name: str, sam_config: Type[SAMConfig], title: str) -> Type[FairseqDataclass]:
    """Dataclass with the options of base optimizer ``name`` and those of ``sam_config``."""
    base_config = OPTIMIZER_DATACLASS_REGISTRY.get(name)
    bases: List[type] = [sam_config] if base_config is None else [sam_config, base_config]
    if name == "adam":
        bases.append(AdamStepConfig)
    fields = [] if base_config else _fields_of_legacy_optimizer(OPTIMIZER_REGISTRY[name])
    return dataclasses.make_dataclass(f"{title}Config", fields, bases=tuple(bases))


def register_sharpness_aware_optimizers() -> List[str]:
    """Register the two wrappers of every base optimizer that has none yet.

    Returns:
        the names that were registered, such as ``sam_adam`` and ``delta_sam_adam``.
    """
    names = []
    bases = {
        name: cls
        for name, cls in OPTIMIZER_REGISTRY.items()
        if name not in NOT_WRAPPED
        and not issubclass(cls, SharpnessAwareOptimizer)
        and f"sam_{name}" not in OPTIMIZER_REGISTRY
    }
    for base_name, base_class in bases.items():
        for prefix, parent, config in (
            ("sam", SAMOptimizer, SAMConfig),
            ("delta_sam", DeltaSAMOptimizer, DeltaSAMConfig),
        ):
            title = parent.__name__.replace("Optimizer", "") + "".join(
                part.capitalize() for part in base_name.split("_")
            )
            attributes = {
                "base_name": base_name,
                "base_class": base_class,
                "__doc__": f"{parent.__doc__} The base optimizer is {base_name}.",
                "__module__": __name__,
            }
            name = f"{prefix}_{base_name}"
            register_optimizer(name, dataclass=_config_of(base_name, config, title))(
                type(title, (parent,), attributes)
            )
            names.append(name)
    return names
