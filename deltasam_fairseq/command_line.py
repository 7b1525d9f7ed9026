"""fairseq's command line: --help with all options, remedies, checks before anything is loaded."""

import argparse
import re
import sys
from typing import Any, Callable, Optional, Sequence

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
from fairseq.registry import REGISTRIES

from deltasam_fairseq.config_checks import check_config
from deltasam_fairseq.fairseq_patches.distributed import world_size_of_torchrun
from deltasam_fairseq.fairseq_patches.patching import patch
from deltasam_fairseq.lr_schedulers import SWAConfig, SWAScheduler
from deltasam_fairseq.optim import DeltaSAMConfig, SharpnessAwareOptimizer


def _with_remedy(error: Callable[[str], None]) -> Callable[[str], None]:
    """Let the parser's ``error`` say why it does not know an option of this package."""

    def wrapper(message: str) -> None:
        if "unrecognized arguments" in message and re.search("--(delta-)?sam-", message):
            message += "; --sam-* and --delta-sam-* belong to --optimizer sam_* and delta_sam_*"
        if "unrecognized arguments" in message and "--swa-" in message:
            message += "; --swa-* belong to --lr-scheduler swa_*, such as swa_polynomial_decay"
        error(message)

    return wrapper


def _show_chosen_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the options of the chosen components to a parser that is about to print its help.

    fairseq adds them after it has printed the help, which therefore never shows them.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in REGISTRIES:
        chooser.add_argument("--" + name.replace("_", "-"))
    chosen, _ = chooser.parse_known_args(list(argv))
    for name, registry in REGISTRIES.items():
        cls = registry["registry"].get(getattr(chosen, name))
        if hasattr(cls, "add_args"):
            choice = f"--{name.replace('_', '-')} {getattr(chosen, name)}"
            cls.add_args(parser.add_argument_group(choice))
    trains = any(action.dest == "update_freq" for action in parser._actions)
    optimizer = OPTIMIZER_REGISTRY.get(chosen.optimizer, object)
    if trains and not issubclass(optimizer, SharpnessAwareOptimizer):
        group = parser.add_argument_group("--optimizer sam_* and delta_sam_*")
        gen_parser_from_dataclass(group, DeltaSAMConfig())
    if trains and not issubclass(
        LR_SCHEDULER_REGISTRY.get(chosen.lr_scheduler, object), SWAScheduler
    ):
        group = parser.add_argument_group("--lr-scheduler swa_*")
        gen_parser_from_dataclass(group, SWAConfig())


def _parse_and_check(
    parse_args_and_arch: Any,
    parser: argparse.ArgumentParser,
    input_args: Optional[Sequence[str]] = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Report this package's errors as the parser's: no traceback, exit code 2."""
    argv = sys.argv[1:] if input_args is None else input_args
    if "-h" in argv or "--help" in argv:
        _show_chosen_options(parser, argv)
    parser.error = _with_remedy(parser.error)  # type: ignore[method-assign,assignment]
    parsed = parse_args_and_arch(parser, input_args, *args, **kwargs)
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    if hasattr(namespace, "distributed_world_size"):
        namespace.distributed_world_size = world_size_of_torchrun(namespace.distributed_world_size)
    if getattr(namespace, "optimizer", None) and hasattr(namespace, "restore_file"):
        try:
            check_config(convert_namespace_to_omegaconf(namespace))
        except (ValueError, FileNotFoundError) as e:
            parser.error(str(e))
    return parsed


def install() -> None:
    """Patch fairseq's parser."""
    patch(options, "parse_args_and_arch", _parse_and_check)
