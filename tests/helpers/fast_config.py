"""Fairseq's configuration of a command line, composed in a third of the time.

hydra composes a configuration in 0.2 s, fairseq does it twice for a trainer, and the tests build
hundreds. What the choice of components makes (task, model, criterion, ...) is composed once and
copied; the values are then set by hydra's own parser and OmegaConf.update, as hydra sets them.
`test_fast_config` compares the result with fairseq's own.
"""

import copy
import functools
from typing import Any, List, Optional, Tuple

from fairseq.dataclass import utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

compose_by_hydra = utils.compose


@functools.lru_cache(maxsize=None)
def _parsed(override: str) -> Any:
    return OverridesParser.create().parse_override(override)


@functools.lru_cache(maxsize=None)
def _components(config_name: str, choices: Tuple[str, ...]) -> DictConfig:
    return compose_by_hydra(config_name, overrides=list(choices), strict=False)


def compose(
    config_name: str, overrides: Optional[List[str]] = None, strict: Optional[bool] = None
) -> DictConfig:
    """hydra.compose as fairseq calls it: without struct mode."""
    values = [o for o in overrides or [] if "." in o.split("=")[0]]
    choices = tuple(o for o in overrides or [] if o not in values)
    cfg = copy.deepcopy(_components(config_name, choices))
    OmegaConf.set_struct(cfg, True)  # a value without a field is an error
    for value in map(_parsed, values):
        OmegaConf.update(cfg, value.key_or_group, copy.deepcopy(value.value()), merge=True)
    OmegaConf.set_struct(cfg, False)
    return cfg


def install() -> None:
    utils.compose = compose
