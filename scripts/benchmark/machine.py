"""What benchmark.py measures on and with."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any, Dict

import fairseq
import numpy
import torch

from scripts.benchmark.methods import DAVDA54, PYTORCH_OPTIMIZER


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux has it
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peers(args: argparse.Namespace) -> Dict[str, str]:
    """Return the versions of the other SAMs that are compared."""
    found = {}
    if PYTORCH_OPTIMIZER in args.methods:
        try:
            found["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
        except importlib.metadata.PackageNotFoundError:
            pass  # the table says so
    if DAVDA54 in args.methods and args.davda54 is not None and args.davda54.is_file():
        digest = hashlib.sha256(args.davda54.read_bytes()).hexdigest()
        found["davda54's sam.py, sha256"] = digest[:12]
    return found


def machine(args: argparse.Namespace) -> Dict[str, Any]:
    """Return what the figures are measured on and with."""
    found = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "numpy": numpy.__version__,
        **peers(args),
        "command": " ".join(map(shlex.quote, ["python", "-m", "scripts.benchmark", *sys.argv[1:]])),
    }
    if args.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
