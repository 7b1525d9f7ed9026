"""Mends of fairseq for runs that break off and go on.

As fairseq is, without a mend (all seen by running it):

- a process killed while checkpoint_last.pt is copied leaves it cut short, and the restarted run
  cannot read it;
- restarted in the middle of an epoch with another number of ranks, a run sees part of the epoch
  twice or never: the position counts batches of a rank, not of all;
- with --heartbeat-timeout, a rank that waits for one that hangs is sent SIGINT, which Python does
  not see while it waits: the timeout is logged and nothing ends;
- after a NaN, the search for its origin stops on RoBERTa with StopIteration, in place of
  FloatingPointError: gradients are Nan/Inf.
"""

import functools
import logging
import re
import signal
from typing import Any, Dict

import fairseq.trainer
from fairseq.data import iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model
from fairseq.nan_detector import NanDetector

logger = logging.getLogger(__name__)

NUM_SHARDS = "deltasam_num_shards"

_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|timed out|timeout|ncclRemoteError|"
    "ncclSystemError|NCCL communicator was aborted",
    re.IGNORECASE,
)


def _whole_copy(copy: Any) -> Any:
    """``PathManager.copy`` that replaces its target at once, by renaming."""

    @functools.wraps(copy)
    def wrapper(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        copied = copy(src_path, dst_path + ".tmp", overwrite=True)
        PathManager.rename(dst_path + ".tmp", dst_path)
        return copied

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def _with_shards(state_dict: Any) -> Any:
    """The iterator's state with the number of ranks that its position is counted for."""

    @functools.wraps(state_dict)
    def wrapper(self: Any) -> Dict[str, Any]:
        return {**state_dict(self), NUM_SHARDS: self.num_shards}

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def rescaled_position(position: int, saved_shards: int, shards: int) -> int:
    """Batches of each of ``shards`` ranks that hold what ``saved_shards`` ranks have seen.

    ``floor(position * saved_shards / shards)``

    The batches of an epoch are dealt to the ranks in turn, so after ``position`` batches a rank
    the first ``position * saved_shards`` are done. Where that does not divide, fewer than
    ``shards`` batches are seen a second time, none is left out.
    """
    return position * saved_shards // shards


def _for_these_shards(load_state_dict: Any) -> Any:
    """Read a position that another number of ranks wrote."""

    @functools.wraps(load_state_dict)
    def wrapper(self: Any, state_dict: Dict[str, Any]) -> None:
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

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


class _NanDetector(NanDetector):
    """Leaves the last word to the error that it was to explain.

    Its hooks on the backward fail in torch for a module that returns a dict without a tensor.
    The forward has been searched by then.
    """

    def __exit__(self, exc_type: Any, *rest: Any) -> bool:
        super().__exit__(exc_type, *rest)
        return exc_type is StopIteration


def _explained(train: Any) -> Any:
    """fairseq's training of an epoch, with a plain word when another rank is gone."""

    @functools.wraps(train)
    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
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

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def explain_lost_ranks(program: Any) -> None:
    """Wrap ``train`` of something that holds fairseq's training program, once."""
    if not hasattr(program.train, "_deltasam"):
        program.train = _explained(program.train)


def install() -> None:
    """Put the mends in place; does nothing the second time."""
    if not hasattr(PathManager.copy, "_deltasam"):
        PathManager.copy = staticmethod(_whole_copy(PathManager.copy))
    iterator = iterators.EpochBatchIterator
    if not hasattr(iterator.state_dict, "_deltasam"):
        iterator.state_dict = _with_shards(iterator.state_dict)
        iterator.load_state_dict = _for_these_shards(iterator.load_state_dict)
    fairseq.trainer.NanDetector = _NanDetector
    if not isinstance(distributed_fairseq_model.DistributedTimeoutWrapper, functools.partial):
        distributed_fairseq_model.DistributedTimeoutWrapper = functools.partial(
            distributed_fairseq_model.DistributedTimeoutWrapper, signal=signal.SIGTERM
        )
