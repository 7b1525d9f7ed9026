"""Trainers on a GPU, and the same random direction on any device."""

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, List, Optional

import torch

from deltasam_fairseq.algorithms import probe_generator
from tests.helpers import tiny

DEVICE = torch.device("cuda", 0)

MODES = {
    "fp32": [],
    "fp16": ["--fp16", "--fp16-no-flatten-grads"],
    "flat-fp16": ["--fp16"],
    "bf16": ["--bf16"],
    "memory-efficient-fp16": ["--memory-efficient-fp16"],
    "memory-efficient-bf16": ["--memory-efficient-bf16"],
    "amp": ["--amp"],
}
OPTIMIZERS = ["sam_adam", "delta_sam_adam"]


def _without_compiler() -> Optional[str]:
    """Why Triton cannot build the launchers of its kernels here, None where it can."""
    if os.environ.get("CC") is None and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler"
    return None


WITHOUT_COMPILER = _without_compiler()


def arguments(data: Path, save_dir: Path, optimizer: str, *more: str, **kwargs: Any) -> List[str]:
    """`tiny.arguments` of a run on a GPU."""
    argv = tiny.arguments(data, save_dir, "--optimizer", optimizer, *more, **kwargs)
    return [word for word in argv if word != "--cpu"]


def build_trainer(
    data: Path,
    save_dir: Path,
    optimizer: str,
    *more: str,
    dtype: Optional[torch.dtype] = None,
    **kwargs: Any,
) -> Any:
    """`tiny.build_trainer` of a run on a GPU."""
    return tiny.build_trainer(arguments(data, save_dir, optimizer, *more, **kwargs), dtype)


def draw_on_the_host(monkeypatch: Any) -> None:
    """Let the probe's direction be drawn in float32 on the host, whatever device it is for."""
    probe = importlib.import_module("deltasam_fairseq.algorithms.probe")
    perturber = importlib.import_module("deltasam_fairseq.core.perturber")
    fill = probe.fill_direction_

    def fill_from_host(out: List[torch.Tensor], generator: Any, threads: int) -> None:
        drawn = [torch.empty(u.shape) for u in out]
        fill(drawn, generator, 1)
        for u, values in zip(out, drawn):
            u.copy_(values)

    def on_the_host(seed: int, update: int, device: torch.device) -> torch.Generator:
        return probe_generator(seed, update, torch.device("cpu"))

    for module in (probe, perturber):
        monkeypatch.setattr(module, "fill_direction_", fill_from_host)
    monkeypatch.setattr(perturber, "probe_generator", on_the_host)
