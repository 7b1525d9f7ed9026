"""Workarounds for runs that stop and go on.

As fairseq is (all seen by running it):

- a process killed while checkpoint_last.pt is copied leaves it cut short, and the restarted run
  cannot read it;
- restarted in the middle of an epoch with another number of ranks, a run sees part of the epoch
  twice or never: the position counts batches of a rank, not of all;
- with --heartbeat-timeout, a rank that waits for one that hangs is sent SIGINT, which Python does
  not see while it waits: the timeout is logged and nothing ends;
- after a NaN, the search for its origin stops on RoBERTa with StopIteration instead of
  FloatingPointError: gradients are Nan/Inf.
"""

import logging
import re
import signal
from typing import Any, Dict

from fairseq.data import iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model
from fairseq.nan_detector import NanDetector

from deltasam_fairseq.fairseq_patches.patching import patch

logger = logging.getLogger(__name__)

NUM_SHARDS = "deltasam_num_shards"

_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|timed out|timeout|ncclRemoteError|"
    "ncclSystemError|NCCL communicator was aborted",
    re.IGNORECASE,
)


def _copy_then_rename(copy: Any, src_path: str, dst_path: str, overwrite: bool = False) -> Any:
    """``PathManager.copy`` that replaces its target at once, by renaming."""
    if not overwrite or not PathManager.supports_rename(dst_path):
        return copy(src_path, dst_path, overwrite=overwrite)
    copied = copy(src_path, dst_path + ".tmp", overwrite=True)
    PathManager.rename(dst_path + ".tmp", dst_path)
    return copied


def _save_num_shards(state_dict: Any, self: Any) -> Dict[str, Any]:
    """The iterator's state with the number of ranks that its position is counted for."""
    return {**state_dict(self), NUM_SHARDS: self.num_shards}


def rescaled_position(position: int, saved_shards: int, shards: int) -> int:
    """Batches of each of ``shards`` ranks that hold what ``saved_shards`` ranks have seen.

    ``floor(position * saved_shards / shards)``

    The batches of an epoch are dealt to the ranks in turn, so after ``position`` batches a rank
    the first ``position * saved_shards`` are done. Where that does not divide, fewer than
    ``shards`` batches are seen a second time, none is skipped.
    """
    return position * saved_shards // shards


def _rescale_position(load_state_dict: Any, self: Any, state_dict: Dict[str, Any]) -> None:
    """Read a position that another number of ranks wrote."""
    saved = state_dict.get(NUM_SHARDS, self.num_shards)
    position = state_dict.get("iterations_in_epoch", 0)
    if saved != self.num_shards and position and type(self) is iterators.EpochBatchIterator:
        seen = position * saved
        position = rescaled_position(position, saved, self.num_shards)
        state_dict = {**state_dict, "iterations_in_epoch": position}
        logger.info(
            f"resuming with {self.num_shards} ranks what {saved} ranks began: {seen} batches "
            f"of epoch {state_dict['epoch']} are done, "
            f"{seen - position * self.num_shards} of them will be seen again"
        )
        if self.grouped_shuffling:
            logger.warning(
                "--grouped-shuffling orders batches by the number of ranks: with another "
                "number, part of this epoch is seen twice or never"
            )
    load_state_dict(self, state_dict)


def _explain_instead_of_failing(exit_: Any, self: Any, exc_type: Any, *rest: Any) -> bool:
    """``NanDetector.__exit__`` that leaves the last word to the error that it was to explain.

    Its hooks on the backward fail in torch for a module that returns a dict without a tensor.
    The forward has been searched by then.
    """
    exit_(self, exc_type, *rest)
    return exc_type is StopIteration


def _terminate_on_timeout(wrapper_class: Any, *args: Any, **kwargs: Any) -> Any:
    """``DistributedTimeoutWrapper`` that sends a signal which ends a waiting process."""
    return wrapper_class(*args, signal=signal.SIGTERM, **kwargs)


def explain_lost_ranks(train: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """fairseq's training of an epoch, with an explanation when another rank is gone."""
    try:
        return train(cfg, *args, **kwargs)
    except RuntimeError as e:
        world_size = distributed_utils.get_data_parallel_world_size()
        if world_size > 1 and _LOST.search(str(e)):
            logger.error(
                f"rank {distributed_utils.get_data_parallel_rank()} of {world_size}: another "
                "rank is gone or hangs; its own log, or that of torchrun or the scheduler, "
                f"says why. Checkpoints in {cfg.checkpoint.save_dir} are whole and hold "
                "unperturbed weights: the same command goes on from the last one"
            )
        raise


def install() -> None:
    """Patch all but ``train``, which is looked up in the program that runs."""
    patch(PathManager, "copy", _copy_then_rename)
    patch(iterators.EpochBatchIterator, "state_dict", _save_num_shards)
    patch(iterators.EpochBatchIterator, "load_state_dict", _rescale_position)
    patch(NanDetector, "__exit__", _explain_instead_of_failing)
    patch(distributed_fairseq_model, "DistributedTimeoutWrapper", _terminate_on_timeout)
