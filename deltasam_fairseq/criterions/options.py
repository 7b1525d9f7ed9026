"""Ranges of options, written beside them."""

import dataclasses
import math
from typing import Any

from fairseq.dataclass import FairseqDataclass


def option(default: Any, help: str, **limits: float) -> Any:
    """A field of a fairseq dataclass with the range of its values.

    Args:
        default: of the option.
        help: says what it is and its unit, then what the papers use; the default is added to it.
        limits: ``at_least``, ``above``, ``at_most``, ``below``.
    """
    if default is not None:
        help += f" (default: {default:g})"
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


_HOLDS = {
    "at_least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at_most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


def check_options(cfg: Any, config_class: type) -> None:
    """Check the values of a configuration against the limits of its fields.

    Args:
        cfg: dataclass, DictConfig or Namespace.
        config_class: the dataclass whose fields were made by `option`.

    Raises:
        ValueError: naming the option, its value, what is allowed and what the option is.
    """
    assert issubclass(config_class, FairseqDataclass)
    for field in dataclasses.fields(config_class):
        limits = field.metadata.get("limits", {})
        value: Any = getattr(cfg, field.name, field.default)
        if not limits or value is None:
            continue
        if not math.isfinite(value) or not all(_HOLDS[k](value, v) for k, v in limits.items()):
            allowed = " and ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in limits.items())
            raise ValueError(
                f"--{field.name.replace('_', '-')} {value}: must be finite, {allowed}; it is the "
                f"{field.metadata['help']}"
            )
