"""Puts the plugin's trainer and checks into fairseq's training program."""

import argparse
import functools
import importlib.util
import re
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence

import fairseq.trainer
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
from fairseq.registry import REGISTRIES

from deltasam_fairseq import left_out
from deltasam_fairseq.config_checks import check_config
from deltasam_fairseq.fairseq_patches import distributed as launch
from deltasam_fairseq.fairseq_patches import fault_tolerance as failures
from deltasam_fairseq.fairseq_patches import fp16_on_cpu as flat_masters
from deltasam_fairseq.lr_schedulers import SWAConfig, SWAScheduler
from deltasam_fairseq.optim import DeltaSAMConfig, SharpnessAwareOptimizer
from deltasam_fairseq.trainer.averaging import validate_average, warn_if_never_averaged
from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer


class _Names:
    """The global names of a program, as attributes that can be set."""

    def __init__(self, names: Dict[str, Any]) -> None:
        self.__dict__ = names


def _training_programs() -> List[Any]:
    """The names of fairseq's training program, wherever it was loaded.

    ``python -m fairseq_cli.train`` and ``torchrun -m`` run it as ``__main__``, and a process
    spawned from there as ``__mp_main__``, each with names of its own. The latter stands in
    ``sys.modules`` as a copy: what its functions look up is in their globals.
    """
    import fairseq_cli.train

    own = (sys.modules.get(name) for name in ("__main__", "__mp_main__"))
    programs = [fairseq_cli.train] + [m for m in own if m and hasattr(m, "validate_and_save")]
    return [_Names(program.main.__globals__) for program in programs]


def _checked_defaults(add_defaults: Any) -> Any:
    """`add_defaults` is the first thing that fairseq's main does after importing the plugin."""

    @functools.wraps(add_defaults)
    def wrapper(cfg: Any) -> None:
        add_defaults(cfg)
        check_config(cfg)
        left_out.warn(cfg)

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def _with_remedy(error: Callable[[str], None]) -> Callable[[str], None]:
    """The parser's ``error``, which knows why an option of this plugin is unknown to it."""

    def wrapper(message: str) -> None:
        if "unrecognized arguments" in message and re.search("--(delta-)?sam-", message):
            message += "; --sam-* and --delta-sam-* belong to --optimizer sam_* and delta_sam_*"
        if "unrecognized arguments" in message and "--swa-" in message:
            message += "; --swa-* belong to --lr-scheduler swa_*, such as swa_polynomial_decay"
        error(message)

    return wrapper


def _show_chosen_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the options of what is chosen to the parser that is about to print its help.

    fairseq prints the help before it adds them, so that nobody ever sees one.
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


def _checked_parse(parse_args_and_arch: Any) -> Any:
    """Command-line errors of this plugin look like all others: no traceback, exit code 2."""

    @functools.wraps(parse_args_and_arch)
    def wrapper(
        parser: argparse.ArgumentParser,
        input_args: Optional[Sequence[str]] = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        argv = sys.argv[1:] if input_args is None else input_args
        if "-h" in argv or "--help" in argv:
            _show_chosen_options(parser, argv)
        parser.error = _with_remedy(parser.error)  # type: ignore[method-assign,assignment]
        parsed = parse_args_and_arch(parser, input_args, *args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(namespace, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
            namespace.tpu = False  # fairseq takes --bf16 for a TPU, on every machine
        if hasattr(namespace, "distributed_world_size"):
            namespace.distributed_world_size = launch.world_size_of_torchrun(
                namespace.distributed_world_size
            )
        if getattr(namespace, "optimizer", None) and hasattr(namespace, "restore_file"):
            cfg = convert_namespace_to_omegaconf(namespace)
            try:
                check_config(cfg)
            except (ValueError, FileNotFoundError) as e:
                parser.error(str(e))
        return parsed

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Install the trainer, the checks and the mends; does nothing the second time."""
    launch.install()
    failures.install()
    flat_masters.install()
    for program in _training_programs():
        if program.Trainer is fairseq.trainer.Trainer:
            program.Trainer = SharpnessAwareTrainer
        if not hasattr(program.add_defaults, "_deltasam"):
            program.add_defaults = _checked_defaults(program.add_defaults)
        if not hasattr(program.validate, "_deltasam"):
            program.validate = validate_average(program.validate)
        if not hasattr(program.train, "_deltasam"):
            program.train = warn_if_never_averaged(program.train)  # marked by the next line
        failures.explain_lost_ranks(program)
    if not hasattr(options.parse_args_and_arch, "_deltasam"):
        options.parse_args_and_arch = _checked_parse(options.parse_args_and_arch)
