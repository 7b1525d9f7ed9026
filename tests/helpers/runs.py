"""Whole runs of fairseq's training program in this process, and what they leave behind."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import fairseq_cli.train
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from tests.helpers import tiny

# Dropout is on, so that a wrong generator shows.
SHORT = ["--dropout", "0.1", "--no-epoch-checkpoints", "--disable-validation"]


class Run(NamedTuple):
    """What a run leaves behind.

    Attributes:
        checkpoint: contents of checkpoint_last.pt; None if the run saved none.
        messages: all that fairseq's progress bar logged, whatever the format.
        updates: what was logged for every update (--log-format json, --log-interval 1).
        save_dir: where its checkpoints are.
    """

    checkpoint: Optional[Dict[str, Any]]
    messages: List[str]
    updates: List[Dict[str, str]]
    save_dir: Path


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: List[Tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.name, record.getMessage()))


def parse(argv: Sequence[str]) -> Any:
    """fairseq's configuration for a command line, as fairseq-train makes it."""
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(argv)))


def train(
    data: Path,
    save_dir: Path,
    *more: str,
    criterion: str = "sentence_prediction",
    validate: bool = False,
) -> Run:
    """Train in this process; ``more`` comes last on the command line and wins."""
    short = [word for word in SHORT if not validate or word != "--disable-validation"]
    cfg = parse(tiny.arguments(data, save_dir, *short, *more, criterion=criterion))
    vars(checkpoint_utils.save_checkpoint).pop("best", None)  # of an earlier run
    messages, logger = _Messages(), logging.getLogger("fairseq.logging.progress_bar")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(messages)
    try:
        fairseq_cli.train.main(cfg)
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
    last = Path(save_dir) / "checkpoint_last.pt"
    return Run(
        load(last) if last.exists() else None,
        [m for _, m in messages.found],
        [json.loads(m) for name, m in messages.found if name == "train_inner" and m[:1] == "{"],
        Path(save_dir),
    )


def load(path: Path) -> Dict[str, Any]:
    return checkpoint_utils.load_checkpoint_to_cpu(str(path))


def json_lines(output: str, key: str = "sam_loss") -> List[Dict[str, str]]:
    """Lines of --log-format json in a program's output that have ``key``."""
    found = [line[line.index("{") :] for line in output.splitlines() if f'"{key}":' in line]
    return [json.loads(line) for line in found]


def assert_same(some: Any, other: Any, path: str = "") -> None:
    """Two nests of dicts, lists and tensors are the same, bit for bit."""
    if torch.is_tensor(some):
        assert torch.equal(some, other), f"{path}: {(some - other).abs().max()}"
    elif isinstance(some, dict):
        assert some.keys() == other.keys(), path
        for key in some:
            assert_same(some[key], other[key], f"{path}/{key}")
    elif isinstance(some, (list, tuple)):
        assert len(some) == len(other), path
        for i, pair in enumerate(zip(some, other)):
            assert_same(*pair, path=f"{path}/{i}")
    else:
        assert some == other, path


def assert_same_end(run: Run, other: Run) -> None:
    """Two runs end with the same weights and the same state of the optimizer, bit for bit."""
    assert run.checkpoint is not None and other.checkpoint is not None
    assert run.checkpoint["model"] and run.checkpoint["last_optimizer_state"]
    assert_same(*(tiny.without_fused(r.checkpoint["model"]) for r in (run, other)), path="model")
    assert_same(*(r.checkpoint["last_optimizer_state"] for r in (run, other)), path="optimizer")
    histories = [r.checkpoint["optimizer_history"][-1] for r in (run, other)]
    assert histories[0]["num_updates"] == histories[1]["num_updates"] > 0


def same_weights(run: Run, other: Run) -> bool:
    assert run.checkpoint is not None and other.checkpoint is not None
    model = other.checkpoint["model"]
    return all(torch.equal(w, model[name]) for name, w in run.checkpoint["model"].items())
