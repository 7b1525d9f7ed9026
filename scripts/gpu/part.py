"""Options of every part of the first run on a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional

from deltasam_fairseq.options import ranged


def part_options(part: str, description: Optional[str]) -> argparse.ArgumentParser:
    """Return the options of a part; the driver, ``scripts/gpu/__main__.py``, passes them all.

    A part writes ``OUT/PART.json`` and ``WORK/PART.md`` and rewrites both as it goes.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m scripts.gpu.{part}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--device", choices=("cuda", "cpu"), required=True, help="cpu: tiny shapes")
    add("--seconds", type=ranged(int, at_least=1), required=True, help="after which it is ended")
    add("--kit", type=Path, required=True, help="folder with minilm/ and glue/")
    add("--work", type=Path, required=True, help="folder for data, runs and PART.md")
    add("--out", type=Path, required=True, help="folder for PART.json")
    return options
