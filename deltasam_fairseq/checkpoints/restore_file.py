"""A --restore-file that is not there is an error, not a training from scratch."""

from typing import Any, Optional, Tuple

from fairseq.file_io import PathManager

_DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def require_restore_file(cfg: Any, suffix: Optional[str] = None) -> None:
    """Stop when the checkpoint to start from is not there.

    fairseq only logs a --restore-file that it does not find, and trains from scratch. Which
    file it will look for, and how (``PathManager.isfile``, remote addresses included), is as
    in ``fairseq.checkpoint_utils.load_checkpoint`` and ``Trainer.load_checkpoint``.

    Args:
        cfg: the ``checkpoint`` part of fairseq's configuration.
        suffix: ``trainer.checkpoint_suffix``; by default cfg.checkpoint_suffix, which is the
            same but for sharded FSDP.

    Raises:
        FileNotFoundError: a --restore-file other than the default, or on a first launch a
            --finetune-from-model or checkpoint.continue_once, is not a file.

    Under data parallelism: call it on every rank; each must see the file, or fairseq's
    broadcast of it hangs. Limiting case: all three at their defaults, nothing is required.
    """
    if suffix is None:
        suffix = getattr(cfg, "checkpoint_suffix", None) or ""
    wanted = _wanted(cfg, suffix)
    if wanted is None:
        return
    option, value, path = wanted
    if not PathManager.isfile(path):
        looked_for = "" if path == value else f" (looked for {path})"
        raise FileNotFoundError(
            f"{option} {value}{looked_for} does not exist or is not a file, and fairseq would "
            f"start from scratch without it. Give the path of a checkpoint file, as seen from "
            f"every rank, or leave {option} out to start from scratch on purpose."
        )


def _wanted(cfg: Any, suffix: str) -> Optional[Tuple[str, str, str]]:
    """The option that names a file, its value, and the path that fairseq makes of it."""
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
