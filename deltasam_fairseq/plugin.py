"""Register this package's components with fairseq, and patch fairseq."""

import sys
from typing import Any, Dict, List

import fairseq.trainer

from deltasam_fairseq import bpe, checkpoints, command_line, models, squad, sts  # noqa: F401  register
from deltasam_fairseq.config_checks import check_config, warn_about_dropped_sentences
from deltasam_fairseq.fairseq_patches import (
    classification_heads,
    data_threads,
    distributed,
    fault_tolerance,
    fp16_on_cpu,
    fused_layers,
    log_file,
    misread_options,
    removed_numpy_names,
)
from deltasam_fairseq.fairseq_patches.patching import patch
from deltasam_fairseq.lr_schedulers import register_swa_schedulers
from deltasam_fairseq.optim import register_sharpness_aware_optimizers
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
    ``sys.modules`` as a copy: its functions look names up in their globals.
    """
    import fairseq_cli.train

    own = (sys.modules.get(name) for name in ("__main__", "__mp_main__"))
    programs = [fairseq_cli.train] + [m for m in own if m and hasattr(m, "validate_and_save")]
    return [_Names(program.main.__globals__) for program in programs]


def _add_defaults_and_check(add_defaults: Any, cfg: Any) -> None:
    """Check a run; ``add_defaults`` is what fairseq's main calls first after importing a plugin."""
    add_defaults(cfg)
    check_config(cfg)
    warn_about_dropped_sentences(cfg)


def install() -> None:
    """Register the components, install the trainer and patch fairseq; again, it changes nothing."""
    register_sharpness_aware_optimizers()
    register_swa_schedulers()
    for part in (
        checkpoints,
        misread_options,
        command_line,
        classification_heads,
        data_threads,
        distributed,
        fault_tolerance,
        fp16_on_cpu,
        fused_layers,
        log_file,
        removed_numpy_names,
    ):
        part.install()
    for program in _training_programs():
        if program.Trainer is fairseq.trainer.Trainer:
            program.Trainer = SharpnessAwareTrainer
        patch(program, "add_defaults", misread_options.set_bpe_of_whole_words)
        patch(program, "add_defaults", _add_defaults_and_check)
        patch(program, "validate", validate_average)
        patch(program, "train", warn_if_never_averaged)
        patch(program, "train", fault_tolerance.explain_lost_ranks)
