"""Checks of a run's configuration, made before any data is loaded."""

from typing import Any

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_REGISTRY
from fairseq.tasks import TASK_REGISTRY, FairseqTask

from deltasam_fairseq.checkpoints import require_restore_file
from deltasam_fairseq.criterions import RegularisedCriterion, has_per_sentence_losses
from deltasam_fairseq.lr_schedulers import SWAScheduler, check_swa_config
from deltasam_fairseq.optim.config import check_optimizer_config
from deltasam_fairseq.optim.sharpness_aware import SharpnessAwareOptimizer


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
    task = _name(cfg.task)
    if task in TASK_REGISTRY and TASK_REGISTRY[task].train_step is not FairseqTask.train_step:
        raise ValueError(
            f"--task {task} trains in a way of its own (it overrides train_step), in which "
            f"--optimizer {optimizer} cannot see per-sentence losses; use --optimizer {sam}"
        )


def _drops_layers_anew(cfg: Any, regulariser: Any) -> bool:
    """Whether the forwards of one loss each drop other layers of the model."""
    layerdrop = (getattr(cfg.model, f"{side}_layerdrop", 0) for side in ("encoder", "decoder"))
    same = getattr(cfg.criterion, "same_dropout", False)
    return any(layerdrop) and regulariser.SEVERAL_MASKS and not same


def _check_criterion(cfg: Any) -> None:
    """Options of this package's criterions, and what their several forwards rule out."""
    name = _name(cfg.criterion)
    cls = CRITERION_REGISTRY.get(name)
    if cls is None or not issubclass(cls, RegularisedCriterion):
        return
    cls.check(cfg.criterion)
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
    if torch_ddp and several_ranks and _drops_layers_anew(cfg, regulariser):
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
            "other weights are trained, by an optimizer built anew, and the average would be lost; "
            "leave one of the two out"
        )


def check_config(cfg: Any) -> None:
    """Check what this plugin adds to a run.

    Args:
        cfg: fairseq's whole configuration.

    Raises:
        ValueError: for an option out of range or options that do not go together.
        FileNotFoundError: for a checkpoint to start from that does not exist.
    """
    require_restore_file(cfg.checkpoint)
    _check_criterion(cfg)
    _check_averaging(cfg)
    optimizer = _name(cfg.optimizer)
    cls = OPTIMIZER_REGISTRY.get(optimizer)
    if cls is None or not issubclass(cls, SharpnessAwareOptimizer):
        return
    check_optimizer_config(cfg.optimizer)
    _check_seam(cfg, f"--optimizer {optimizer}", "each rank would perturb and step on its own")
    if getattr(cfg.optimizer, "delta_sam_beta", 0) and cfg.optimizer.sam_rho:
        _check_delta_sam(cfg, optimizer)
