"""Part 3: what an update costs on a GPU, the most important settings first.

    python -m scripts.gpu.costs --device cuda --seconds 150 --kit .gpu --work WORK --out OUT

Compares Adam, SAM and delta-SAM on RoBERTa base and large in float32, float16 and bfloat16, and
stochastic rounding in one compiled kernel with the plain operations. OUT/costs.json and
WORK/costs.md are rewritten after each part, so that a kill leaves what was measured. No part
begins that is not expected to end within --seconds. TF32 is off. KIT/sam.py, if it is there, is
compared too: github.com/davda54/sam's.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
import time
import traceback
import unittest.mock
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from deltasam_fairseq.algorithms import OPERATIONS, Kernels, StochasticRounding, global_norm
from deltasam_fairseq.core import compiled_rounding
from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.measure import Seconds, Update, measure_here, synchronize, time_in_turn
from scripts.benchmark.methods import OTHER_SAMS, OURS, RHO, Setting, arguments, build_trainer
from scripts.benchmark.report import (
    add_figures,
    extra_forwards,
    floor_table,
    machine,
    method_table,
    phase_table,
    ratio,
)
from scripts.gpu.part import part_options

METHODS = ("Adam", "SAM", "delta-SAM")
STEPS = ("Adam, fairseq", "Adam, fused")  # other base steps, beside that of "Adam"
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# bounds, "bars" in JSON
SAM_BOUND = 2.05  # two passes instead of one, and 2.5 % for moving the weights
DELTA_SAM_BOUNDS = {1: 1.17, 2: 8 / 6}  # by extra forwards, where a backward takes two forwards


class Part(NamedTuple):
    """What is measured and written in one piece.

    ``expected`` is in seconds, of a first run with an empty cache of compiled kernels.
    """

    title: str
    expected: float
    measure: Callable[[], Dict[str, Any]]


@functools.lru_cache(maxsize=None)
def initial_model(shape: str, device: str) -> Any:
    """Return a RoBERTa in float32, for all methods to copy: drawing its weights takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        argv = arguments(Setting(shape, 1, 8, 1, "fp32", device), Path(folder) / "data")
        return build_trainer([*argv, "--optimizer", "adam"]).get_model()


def compare(args: argparse.Namespace, methods: Sequence[str], setting: Setting) -> Dict[str, Any]:
    """Return the benchmark's comparison of the methods, with its figures and bounds."""
    words = {"methods": methods, "rounds": 10 if args.device == "cuda" else 2, "phase_rounds": 1}
    namespace = argparse.Namespace(**{**vars(args), **words})
    model = initial_model(setting.shape, setting.device)
    result = add_figures(measure_here(namespace, setting, model))
    return {**result, "bars": bars(result)}


def bars(result: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the ratios that docs/benchmarks.md bounds: measured, their bound, whether it holds."""
    found: Seconds = result["seconds_of_all_rounds"]
    forwards = extra_forwards(Setting(**result["setting"]))
    floor = result["floors"]["wall"]["floor of the passes"]
    rows = []
    for name, base, bar, passes in (
        ("SAM", "Adam", SAM_BOUND, 2.0),
        ("delta-SAM", "SAM", DELTA_SAM_BOUNDS[forwards], floor),
    ):
        if name in found and base in found:
            measured, scatter = ratio(found, name, base, "wall")
            row = {"ratio": f"{name} / {base}", "measured": measured, "spread": scatter}
            rows.append({**row, "floor of the passes": passes, "bar": bar, "met": measured <= bar})
    return rows


@torch.no_grad()
def compare_rounding(device: str, precision: str, shapes: Sequence[str]) -> Dict[str, Any]:
    """Return what the rounding of all weights takes, by plain operations and compiled.

    The weights are float32 and move by rho along gradients of half precision, as under --fp16.
    """
    dtype = HALF[precision]
    rows: List[Dict[str, Any]] = []
    with unittest.mock.patch.object(compiled_rounding.logger, "warning") as warning:
        synchronize(device)
        begin = time.perf_counter()
        one = torch.ones(1, device=device)
        compiled = compiled_rounding.rounding_kernels(dtype, one, dtype, compiled=True)
        seconds = time.perf_counter() - begin
        for shape in shapes:
            if compiled is not OPERATIONS or not rows:
                rows.append({"shape": shape, **round_weights(device, dtype, shape, compiled)})
    why = "; ".join(call.args[0] for call in warning.call_args_list)
    return {"precision": precision, "seconds to compile": seconds, "rows": rows, "warnings": why}


def round_weights(device: str, dtype: torch.dtype, shape: str, compiled: Kernels) -> Dict[str, Any]:
    """Return median seconds of both ways, and the share of weights that they round differently."""
    generator = torch.Generator(device).manual_seed(1)
    values = [p.detach() for p in initial_model(shape, device).parameters()]
    grads = [torch.randn_like(v).to(dtype) for v in values]
    scale = (RHO / global_norm(grads)).float()
    results: Dict[str, List[Tensor]] = {}

    def rounded_by(name: str, kernels: Kernels) -> Update:
        results[name] = [v.to(dtype) for v in values]
        rounding = StochasticRounding(dtype, generator, kernels)

        def update(samples: Any) -> None:
            generator.manual_seed(2)
            rounding.move_(results[name], values, grads, scale)

        return update

    ways = {"operations": OPERATIONS, "compiled": compiled}
    updates = {name: rounded_by(name, kernels) for name, kernels in ways.items()}
    found = time_in_turn(updates, [[]], 5, device)
    pairs = list(zip(*results.values()))
    weights = sum(v.numel() for v in values)
    return {
        "weights": weights,
        "seconds": {name: sorted(each["wall"])[2] for name, each in found.items()},
        "differ": sum(int((a != b).sum()) for a, b in pairs) / weights,
        "moved": sum(int((a != v.to(dtype)).sum()) for (a, _), v in zip(pairs, values)) / weights,
    }


def parts(args: argparse.Namespace) -> List[Part]:
    """Return what to measure, the most important first."""

    def comparison(
        shape: str, size: int, length: int, precision: str, expected: float, *more: str
    ) -> Part:
        setting = Setting(shape, size, length, 1, precision, args.device)
        run = functools.partial(compare, args, (*METHODS, *more), setting)
        return Part(setting.title, expected, run)

    def rounding(precision: str, expected: float, *shapes: str) -> Part:
        run = functools.partial(compare_rounding, args.device, precision, shapes)
        return Part(f"stochastic rounding, {args.device}, {precision}", expected, run)

    if args.device == "cpu":  # a dry run
        return [
            comparison("small", 2, 8, "fp32", 5, *OTHER_SAMS),
            rounding("bf16", 10, "small"),
            comparison("small", 2, 8, "bf16", 5),
        ]
    return [
        comparison("base", 16, 128, "fp32", 16, *OTHER_SAMS),
        comparison("base", 16, 128, "fp16", 12, *STEPS),
        comparison("large", 32, 128, "bf16", 15),
        comparison("base", 16, 128, "bf16", 9),
        rounding("fp16", 20, "base", "large"),
        comparison("large", 16, 128, "fp16", 14),
        comparison("large", 16, 128, "bf16", 14),
        comparison("large", 32, 128, "fp16", 15),
        comparison("base", 32, 128, "fp16", 9),
        comparison("base", 32, 128, "bf16", 9),
        rounding("bf16", 20, "base", "large"),
    ]


def bounds_table(comparisons: Sequence[Dict[str, Any]]) -> str:
    """Return the bounded ratios of all settings."""
    header = ["setting", "ratio", "measured", "floor of the passes", "bound", "within"]
    rows = []
    for result in comparisons:
        for row in result["bars"]:
            cells = [Setting(**result["setting"]).title, row["ratio"]]
            cells.append(f"{row['measured']:.3f} ± {row['spread']:.3f}")
            cells += [f"{row['floor of the passes']:.3f}", f"{row['bar']:.3f}"]
            rows.append([*cells, "yes" if row["met"] else "**no**"])
    return markdown_table(header, rows)


def rounding_table(results: Sequence[Dict[str, Any]]) -> str:
    """Return times of the rounding, and why it is not compiled where it is not."""
    header = ["to", "RoBERTa", "weights", "operations, ms", "compiled, ms", "operations / compiled"]
    header += ["rounded differently", "moved", "seconds to compile"]
    rows, warnings = [], []
    for result in results:
        for row in result["rows"]:
            plain, compiled = row["seconds"]["operations"], row["seconds"]["compiled"]
            cells = [result["precision"], row["shape"], f"{row['weights'] / 1e6:.1f}M"]
            cells += [f"{1000 * plain:.2f}", f"{1000 * compiled:.2f}", f"{plain / compiled:.2f}"]
            cells += [f"{row['differ']:.1e}", f"{row['moved']:.1%}"]
            rows.append([*cells, f"{result['seconds to compile']:.1f}"])
        if result["warnings"]:
            warnings.append(f"Not compiled ({result['precision']}): {result['warnings']}.")
    return "\n\n".join([markdown_table(header, rows), *warnings])


def markdown(record: Dict[str, Any]) -> str:
    """Return the findings, with headings of the second level and below."""
    facts = record["machine"]
    line = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    blocks = ["## Costs of an update", f"`{facts['command']}`", f"{line}, TF32 off"]
    measured = [part for part in record["parts"].values() if part["measured"]]
    comparisons = [p["measured"] for p in measured if "bars" in p["measured"]]
    roundings = [p["measured"] for p in measured if "bars" not in p["measured"]]
    missing = [f"- {title}: {p['why']}" for title, p in record["parts"].items() if p["why"]]
    if missing:
        blocks += ["Not measured:", "\n".join(missing)]
    if comparisons:
        words = "By count, SAM makes two passes for Adam's one. delta-SAM makes one forward without"
        words += " graph more in float32 (7/6), two in half precision (8/6)."
        blocks += ["### Bounds", words, bounds_table(comparisons)]
    if roundings:
        blocks += ["### Stochastic rounding of all weights", rounding_table(roundings)]
    for result in comparisons:
        steps = ", ".join(f"{name}: {step}" for name, step in result["base_steps"].items())
        blocks += [f"### {Setting(**result['setting']).title}", f"Base steps: {steps}."]
        blocks += [method_table(result), floor_table(result), phase_table(result)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def write(record: Dict[str, Any], args: argparse.Namespace) -> None:
    """Write both files."""
    atomic_write(args.work / "costs.md", markdown(record))
    atomic_write(args.out / "costs.json", json.dumps(record, indent=1) + "\n")


def measure(part: Part) -> Dict[str, Any]:
    """Return what was measured, or why nothing was; what it held of the device is free again."""
    begin = time.monotonic()
    found, why = None, ""
    try:
        found = part.measure()
    except Exception as error:
        traceback.print_exc()
        why = f"failed, {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"measured": found, "why": why, "seconds": time.monotonic() - begin}


def main(argv: Optional[Sequence[str]] = None, spent: float = 0.0) -> int:
    """Measure what there is time for; return 0 if that is anything.

    Args:
        spent: of --seconds already, by imports.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = part_options("costs", __doc__).parse_args(argv)
    begin = time.monotonic() - spent
    torch.set_float32_matmul_precision("highest")
    benchmark = {
        "memory": True,
        "trace": False,
        "threads": torch.get_num_threads(),
        "methods": [*OURS, *OTHER_SAMS],
    }
    args = argparse.Namespace(**vars(args), **benchmark, davda54=args.kit / "sam.py")
    plan = parts(args)
    record: Dict[str, Any] = {
        "machine": machine(args, argv, "scripts.gpu.costs"),
        "parts": {p.title: {"measured": None, "why": "not reached", "seconds": 0} for p in plan},
    }
    pace = 1.0  # of this machine, in the expected seconds
    for part in plan:
        write(record, args)
        left, needed = args.seconds - (time.monotonic() - begin), pace * part.expected
        if needed > left:
            why = f"not begun, would take {needed:.0f} s of the {max(left, 0):.0f} s left"
            record["parts"][part.title]["why"] = why
            continue
        record["parts"][part.title]["why"] = "not ended"
        write(record, args)
        done = measure(part)
        pace = max(pace / 2, done["seconds"] / part.expected, 0.25)
        record["parts"][part.title] = done
    write(record, args)
    return 0 if any(part["measured"] for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(spent=time.process_time()))
