"""Checks of a run's configuration, made before any data is loaded."""

import logging
import os
from typing import Any, Optional, Tuple

import numpy as np
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary, data_utils
from fairseq.file_io import PathManager
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
from fairseq.tasks import TASK_REGISTRY, FairseqTask

from deltasam_fairseq.criterions import (
    RegularisedCriterion,
    has_loss_of_output,
    has_per_sentence_losses,
)
from deltasam_fairseq.criterions.sentence import check_number_of_classes
from deltasam_fairseq.lr_schedulers import SWAScheduler, check_swa_config
from deltasam_fairseq.optim.config import check_optimizer_config, weights_strength
from deltasam_fairseq.optim.sharpness_aware import SharpnessAwareOptimizer
from deltasam_fairseq.options import require

logger = logging.getLogger(__name__)

_DEFAULT_RESTORE_FILE = "checkpoint_last.pt"
_KEEP_ALL = ("span_prediction", "sentence_embedding")  # tasks of ours: batches of any size


def _name(node: Any) -> Any:
    return node if isinstance(node, str) or node is None else getattr(node, "_name", None)


def _check_seam(cfg: Any, asked: str, each_rank: str) -> None:
    """Refuse the ways of training whose update is not one step of fairseq's Trainer.

    Args:
        cfg: fairseq's whole configuration.
        asked: option and value that need the seam.
        each_rank: what ranks would do that are not the same after every update.
    """
    distributed = cfg.distributed_training
    for wanted, option, why in (
        (cfg.common.model_parallel_size > 1, "model-parallel-size", "Megatron has its own trainer"),
        (cfg.common.tpu, "tpu", "not supported"),
        (distributed.pipeline_model_parallel, "pipeline-model-parallel", "not supported"),
        (cfg.optimization.use_bmuf, "use-bmuf", each_rank),
        (
            distributed.ddp_backend in ("slowmo", "fully_sharded"),
            f"ddp-backend {distributed.ddp_backend}",
            "use --ddp-backend legacy_ddp or pytorch_ddp",
        ),
    ):
        if wanted:
            raise ValueError(f"--{option} cannot be combined with {asked}: {why}")


def _check_delta_sam(cfg: Any, optimizer: str) -> None:
    """delta-SAM needs per-sentence losses from a forward of the criterion."""
    sam = optimizer.replace("delta_sam", "sam")
    criterion = _name(cfg.criterion)
    if criterion in CRITERION_REGISTRY and not has_per_sentence_losses(
        CRITERION_REGISTRY[criterion]
    ):
        raise ValueError(
            f"--criterion {criterion} gives no per-sentence losses, which --optimizer {optimizer} "
            f"needs; use --optimizer {sam}, or give the criterion a method "
            "per_sentence_losses(model, sample) (see docs/algorithm.md)"
        )
    unseen = f"--optimizer {optimizer} cannot see per-sentence losses; use --optimizer {sam}"
    _check_task_steps(cfg, unseen)


def _check_task_steps(cfg: Any, unseen: str) -> None:
    """Refuse a task that calls the criterion in a way of its own.

    Args:
        unseen: the end of the error, from the option that needs the criterion's calls.
    """
    task = _name(cfg.task)
    if task in TASK_REGISTRY and TASK_REGISTRY[task].train_step is not FairseqTask.train_step:
        raise ValueError(
            f"--task {task} trains in a way of its own (it overrides train_step), in which {unseen}"
        )


def _check_outputs(cfg: Any, asked: str) -> None:
    """Require a loss of the model's output alone, in one call a micro-batch.

    Args:
        asked: the option that needs it.
    """
    criterion = _name(cfg.criterion)
    if criterion in CRITERION_REGISTRY and not has_loss_of_output(CRITERION_REGISTRY[criterion]):
        raise ValueError(
            f"--criterion {criterion} cannot be combined with {asked}: its loss is not "
            f"known to be a function of the model's output alone; drop {asked}, use "
            "another criterion such as plain, or, if it is one, say so by an attribute of its "
            "class, loss_of_output = True"
        )
    _check_task_steps(cfg, f"{asked} cannot see the outputs; drop it")


def _drops_other_layers(cfg: Any, regulariser: Any) -> bool:
    """Whether the forwards of one loss each drop other layers of the model."""
    layerdrop = (getattr(cfg.model, f"{side}_layerdrop", 0) for side in ("encoder", "decoder"))
    same = getattr(cfg.criterion, "same_dropout", False)
    return any(layerdrop) and regulariser.SEVERAL_MASKS and not same


def _check_whole_batch(cfg: Any) -> None:
    """Refuse an ascent from a part of the batch that a sentence's loss depends on."""
    for option, whole in (("sam_ascent_fraction", 1), ("sam_scope", "global")):
        value = getattr(cfg.optimizer, option, whole)
        local = option == "sam_scope" and getattr(cfg.criterion, "local_negatives", False)
        require(
            value == whole or local,
            option,
            value,
            f"--criterion {_name(cfg.criterion)}: the loss of a sentence depends on the others of "
            "its batch, of all ranks; drop this option",
        )


def _check_criterion(cfg: Any) -> None:
    """Options of this package's criterions, and what their several forwards rule out."""
    name = _name(cfg.criterion)
    cls = CRITERION_REGISTRY.get(name)
    if cls is None or not issubclass(cls, RegularisedCriterion):
        return
    cls.check(cfg.criterion)
    if not cls.sentences_are_independent:
        _check_whole_batch(cfg)
    if cls.task_name is not None and _name(cfg.task) not in (None, cls.task_name):
        raise ValueError(
            f"--criterion {name} cannot be combined with --task {_name(cfg.task)}: use --task "
            f"{cls.task_name}, or another criterion"
        )
    regulariser = cls.regulariser_class
    regulariser.check_training(cfg.criterion)
    distributed = cfg.distributed_training
    torch_ddp = distributed.ddp_backend in ("pytorch_ddp", "c10d")
    several_ranks = distributed.distributed_world_size > 1
    if torch_ddp and several_ranks and _drops_other_layers(cfg, regulariser):
        raise ValueError(
            f"--encoder-layerdrop cannot be combined with --criterion {name} under --ddp-backend "
            "pytorch_ddp: each forward drops other layers, and torch takes them for unused; use "
            "--ddp-backend legacy_ddp"
        )
    if not regulariser.INNER_BACKWARD:
        return
    if getattr(cfg.model, "checkpoint_activations", False):
        raise ValueError(
            f"--checkpoint-activations cannot be combined with --criterion {name}: torch cannot "
            "differentiate with respect to the embeddings through it; use r3f or r_drop, or "
            "smaller batches with --update-freq"
        )
    if distributed.ddp_backend == "fully_sharded":
        raise ValueError(
            f"--ddp-backend fully_sharded cannot be combined with --criterion {name}: its inner "
            "steps need the whole model; use --ddp-backend legacy_ddp or pytorch_ddp"
        )


def _check_labels(cfg: Any) -> None:
    """Check the options of sentence_prediction against the labels of the data, if there are any.

    fairseq alone ends in IndexError in the first update, or in FileNotFoundError.
    """
    if _name(cfg.task) != "sentence_prediction" or not cfg.task.data:
        return
    if getattr(cfg.criterion, "regression_target", False):
        return
    folder = os.path.join(cfg.task.data, "label")
    dictionary = os.path.join(folder, "dict.txt")
    if os.path.isfile(dictionary):
        check_number_of_classes(Dictionary.load(dictionary), cfg.task.num_classes)
    elif os.path.isdir(folder) and any(name.endswith(".label") for name in os.listdir(folder)):
        raise ValueError(
            f"--regression-target is missing: {folder} has numbers (*.label) and no classes "
            "(dict.txt); give --regression-target and --num-classes 1"
        )


def _check_whole_words(cfg: Any) -> None:
    """--mask-whole-words has the BPE that knows where words begin."""
    if _name(cfg.task) == "masked_lm" and cfg.task.mask_whole_words and cfg.bpe is None:
        raise ValueError(
            "--mask-whole-words: no --bpe is given, without which fairseq masks single tokens; "
            "give the one that the data was encoded with, such as --bpe gpt2"
        )


def _check_averaging(cfg: Any) -> None:
    """Options of weight averaging, which needs the same weights on every rank."""
    name = _name(cfg.lr_scheduler)
    cls = LR_SCHEDULER_REGISTRY.get(name)
    if cls is None or not issubclass(cls, SWAScheduler):
        return
    check_swa_config(cfg.lr_scheduler)
    asked = f"--lr-scheduler {name}"
    _check_seam(cfg, asked, "each rank would average weights of its own")
    if cfg.common.quantization_config_path is not None:
        raise ValueError(
            f"--quantization-config-path cannot be combined with {asked}: at each of its steps "
            "other weights are trained, by a new optimizer, and the average would be lost; drop "
            "one of the two"
        )


def check_restore_file(cfg: Any) -> None:
    """Stop if the checkpoint to start from does not exist.

    fairseq only logs a --restore-file that it does not find, and trains from scratch. The file that
    it will look for, remote addresses included, is found as in
    ``fairseq.checkpoint_utils.load_checkpoint`` and ``Trainer.load_checkpoint``.

    Args:
        cfg: the ``checkpoint`` part of fairseq's configuration.

    Raises:
        FileNotFoundError: a --restore-file other than the default, or on a first launch a
            --finetune-from-model or checkpoint.continue_once, is not a file.

    Under data parallelism: call it on every rank; each must see the file, or fairseq's
    broadcast of it hangs. Limiting case: all three at their defaults, nothing is required.
    """
    wanted = _file_to_start_from(cfg, getattr(cfg, "checkpoint_suffix", None) or "")
    if wanted is None:
        return
    option, value, path = wanted
    if not PathManager.isfile(path):
        looked_for = "" if path == value else f" (looked for {path})"
        raise FileNotFoundError(
            f"{option} {value}{looked_for} does not exist or is not a file, and fairseq would "
            f"start from scratch without it. Give the path of a checkpoint file, as seen from "
            f"every rank, or omit {option} to start from scratch on purpose."
        )


def _file_to_start_from(cfg: Any, suffix: str) -> Optional[Tuple[str, str, str]]:
    """Return the option that names a file, its value, and the path that fairseq makes of it."""
    if cfg.restore_file != _DEFAULT_RESTORE_FILE:
        # As fairseq does it, every ".pt" and not only the last.
        path = cfg.restore_file.replace(".pt", suffix + ".pt")
        return "--restore-file", cfg.restore_file, path
    if PathManager.exists(f"{cfg.save_dir}/checkpoint_last{suffix}.pt"):
        return None
    for option in ("continue_once", "finetune_from_model"):
        value = getattr(cfg, option, None)
        if value is not None:
            return "--" + option.replace("_", "-"), value, value
    return None


def check_config(cfg: Any) -> None:
    """Check what this plugin adds to a run.

    Args:
        cfg: fairseq's whole configuration.

    Raises:
        ValueError: for an option out of range or options that do not go together.
        FileNotFoundError: for a checkpoint to start from that does not exist.
    """
    check_restore_file(cfg.checkpoint)
    _check_criterion(cfg)
    _check_labels(cfg)
    _check_whole_words(cfg)
    _check_averaging(cfg)
    optimizer = _name(cfg.optimizer)
    cls = OPTIMIZER_REGISTRY.get(optimizer)
    if cls is None or not issubclass(cls, SharpnessAwareOptimizer):
        return
    check_optimizer_config(cfg.optimizer)
    _check_seam(cfg, f"--optimizer {optimizer}", "each rank would perturb and step on its own")
    criterion = CRITERION_REGISTRY.get(_name(cfg.criterion))
    if cfg.optimizer.sam_micro and not getattr(criterion, "sentences_are_independent", True):
        raise ValueError(
            f"--sam-micro {cfg.optimizer.sam_micro} cannot be combined with --criterion "
            f"{_name(cfg.criterion)}: the loss of a sentence depends on the others of its "
            "mini-batch, which groups would take away; drop --sam-micro"
        )
    if weights_strength(cfg.optimizer) and cfg.optimizer.sam_rho:
        _check_delta_sam(cfg, optimizer)
    if cfg.optimizer.sam_mask != "none" and getattr(cfg.model, "checkpoint_activations", False):
        raise ValueError(
            "--checkpoint-activations cannot be combined with --sam-mask: torch cannot take the "
            "gradients of single sentences through it; drop one of the two"
        )
    scheduler = _name(cfg.lr_scheduler)
    along_lr = cfg.optimizer.sam_rho_schedule == "lr" and cfg.optimizer.sam_rho_lr_max is None
    if along_lr and scheduler in ("triangular", "swa_triangular"):
        raise ValueError(
            f"--sam-rho-schedule lr with --lr-scheduler {scheduler}, whose --lr is the smallest "
            "rate: give the largest as --sam-rho-lr-max (and --lr as --sam-rho-lr-min)"
        )
    if cfg.optimizer.sam_functional:
        _check_outputs(cfg, "--sam-functional")
    if cfg.optimizer.sam_radius != "rho":
        _check_outputs(cfg, f"--sam-radius {cfg.optimizer.sam_radius}")


def drops_sentences(multiple: int) -> bool:
    """Whether this fairseq drops a last batch that is no multiple of ``multiple``.

    fairseq 0.12.2 keeps it; later ones drop it, from training, validation and generation alike.

    Args:
        multiple: --required-batch-size-multiple.
    """
    sentences = np.arange(multiple + 1)
    batches = data_utils.batch_by_size(
        sentences,
        num_tokens_fn=lambda _: 1,
        num_tokens_vec=np.ones_like(sentences),
        max_sentences=multiple,
        required_batch_size_multiple=multiple,
    )
    return sum(len(batch) for batch in batches) < len(sentences)


def warn_about_dropped_sentences(cfg: Any) -> None:
    """Warn if this run will drop sentences; fairseq's default drops up to 7 of every data set.

    Args:
        cfg: fairseq's whole configuration.
    """
    multiple = cfg.dataset.required_batch_size_multiple
    if multiple > 1 and _name(cfg.task) not in _KEEP_ALL and drops_sentences(multiple):
        logger.warning(
            f"--required-batch-size-multiple {multiple}: this fairseq drops up to "
            f"{multiple - 1} sentences of every data set, in validation too, and logs nothing; "
            "to keep all, give --required-batch-size-multiple 1"
        )
