"""Options with the range of their values beside them; errors name option, value and remedy."""

import argparse
import dataclasses
import math
from typing import Any, Callable, Dict, Mapping, Optional


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what to change."""


_HOLDS: Dict[str, Callable[[float, float], bool]] = {
    "at_least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at_most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


def _range(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())


def _in_range(value: Any, limits: Mapping[str, float]) -> bool:
    return math.isfinite(value) and all(_HOLDS[name](value, v) for name, v in limits.items())


def require(condition: bool, option: str, value: Any, remedy: str) -> None:
    """Raise UsageError ``--option value: remedy`` unless a condition holds."""
    if not condition:
        raise UsageError(f"--{option.replace('_', '-')} {value}: {remedy}")


def check_range(option: str, value: Any, remedy: str = "", **limits: float) -> None:
    """Check a number.

    Args:
        option: its name, with - or _.
        value: finite is asked for besides.
        remedy: what to give instead, or what the option is.
        limits: ``at_least``, ``above``, ``at_most``, ``below``.

    Raises:
        UsageError: naming the option, its value, what is allowed and the remedy.
    """
    finite = "finite and " if isinstance(value, float) and len(limits) == 1 else ""
    allowed = f"must be {finite}{_range(limits)}" + (f"; {remedy}" if remedy else "")
    require(value is not None and _in_range(value, limits), option, value, allowed)


def option(default: Any, help: str, remedy: Optional[str] = None, **limits: float) -> Any:
    """Return a field of a fairseq dataclass, for a number with a range.

    Args:
        default: None where the option may be omitted.
        help: says what it is and its unit, then what the papers use; the range and the default are
            added to it.
        remedy: what the error says to give instead; default: what the option is.
        limits: as in `check_range`.
    """
    remedy = remedy or f"it is the {help}"
    help += "; " + _range(limits) if limits else ""
    help += f" (default: {default:g})" if default is not None else ""
    return dataclasses.field(
        default=default, metadata={"help": help, "limits": limits, "remedy": remedy}
    )


def check_options(cfg: Any, config_class: type) -> None:
    """Check the values of a configuration against the ranges of its options.

    Args:
        cfg: dataclass, DictConfig or Namespace.
        config_class: the dataclass whose fields `option` has made.

    Raises:
        UsageError: see `check_range`.
    """
    for field in dataclasses.fields(config_class):
        limits = field.metadata.get("limits")
        value = getattr(cfg, field.name, field.default)
        if limits and not (value is None and field.default is None):
            check_range(field.name, value, field.metadata["remedy"], **limits)


def ranged(kind: Callable[[str], Any], **limits: float) -> Callable[[str], Any]:
    """Return a type for argparse: an int or a float in a range.

    Args:
        kind: ``int`` or ``float``.
        limits: as in `check_range`.
    """

    def convert(text: str) -> Any:
        value = kind(text)
        if not _in_range(value, limits):
            raise argparse.ArgumentTypeError(f"must be {_range(limits)}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert
