"""Part 1: updates of every optimizer in every precision on a small RoBERTa.

The first update has a learning rate of 0: the weights have to be what they were, bit for bit.  The
second has one: they have to move and stay finite.  SAM and delta-SAM have to log what they promise.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq.logging import metrics
from fairseq.optim import OPTIMIZER_REGISTRY

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.methods import (
    PRECISIONS,
    Setting,
    arguments,
    build_trainer,
    random_batches,
)
from scripts.gpu.part import part_options

# Precision -> options; flat masters are the default of fairseq, without them Adam steps over lists.
MODES = {
    **{name: PRECISIONS[name] for name in ("fp32", "fp16", "bf16", "amp")},
    "fp16, no flat masters": "--fp16 --fp16-no-flatten-grads",
    "memory-efficient-fp16": "--memory-efficient-fp16",
    "memory-efficient-bf16": "--memory-efficient-bf16",
}
LOGGED = ("sam_loss", "sharpness", "ascent_gnorm")  # by SAM and delta-SAM
LOGGED_BY_DELTA_SAM = ("delta_sam_effective", "delta_sam_r", "delta_sam_negative")
NEEDS_MORE = ("lamb", "cpu_adam", "composite")  # apex, deepspeed, groups of parameters
ADAM = "--adam-betas (0.9,0.98) --adam-eps 1e-6"  # of the benchmark's options
LR = 1e-3


def cases(device: str) -> Iterator[Tuple[str, str]]:
    """Yield optimizer and precision, the most important first."""
    modes = [m for m in MODES if device == "cuda" or m != "amp"]  # which a CPU does not have
    family = ("adam", "sam_adam", "delta_sam_adam")
    for mode in modes:
        for optimizer in family:
            yield optimizer, mode
    if device == "cpu":  # a dry run; the tests have the others
        return
    prefixes = ("sam_", "delta_sam_")
    plain = [n for n in OPTIMIZER_REGISTRY if not n.startswith(prefixes) and n not in NEEDS_MORE]
    for mode in ("fp32", "fp16, no flat masters"):  # what all of them take
        for name in sorted(plain):
            for optimizer in (f"sam_{name}", f"delta_sam_{name}"):
                if optimizer not in family:
                    yield optimizer, mode


def snapshot(trainer: Any) -> List[torch.Tensor]:
    """Return copies of the model's weights."""
    return [p.detach().clone() for p in trainer.get_model().parameters()]


def log_of_update(trainer: Any, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Make one update; return what it logs."""
    with metrics.aggregate(new_root=True) as log:
        trainer.train_step(samples)
    return dict(log.get_smoothed_values())


def promised(optimizer: str, mode: str) -> List[str]:
    """Return the keys of the log that an optimizer promises."""
    half, delta_sam = mode != "fp32", optimizer.startswith("delta_sam_")
    if not (delta_sam or optimizer.startswith("sam_")):
        return []
    keys = [*LOGGED, *(["sam_realised"] if half else [])]
    if delta_sam:
        keys += [*LOGGED_BY_DELTA_SAM, *(["delta_sam_radius"] if half else [])]
    return keys


def faults(optimizer: str, mode: str, device: str) -> List[str]:
    """Make two updates; return what is wrong, nothing if all is well."""
    short, length = (4, 8) if device == "cpu" else (16, 32)
    setting = Setting("small", short, length, 1, "fp32", device)
    with tempfile.TemporaryDirectory() as folder:
        words = " ".join([*arguments(setting, Path(folder) / "data"), MODES[mode]])
        if not optimizer.endswith("adam"):
            words = words.replace(ADAM, "")
        trainer = build_trainer([*words.split(), "--optimizer", optimizer])
    batches = random_batches(setting, 2)
    trainer.reset_dummy_batch(batches[0])
    before = snapshot(trainer)
    trainer.optimizer.set_lr(0.0)
    log_of_update(trainer, batches[:1])
    found = []
    if not all(map(torch.equal, before, snapshot(trainer))):
        found.append("weights changed at a learning rate of 0")
    trainer.optimizer.set_lr(LR)
    log = log_of_update(trainer, batches[1:])
    after = snapshot(trainer)
    if all(map(torch.equal, before, after)):
        found.append("weights did not change")
    if not all(bool(torch.isfinite(w).all()) for w in after):
        found.append("weights are not finite")
    if trainer.get_num_updates() != 2:
        found.append(f"{trainer.get_num_updates()} updates of 2")
    for key in promised(optimizer, mode):
        value = log.get(key)
        if value is None or not torch.isfinite(torch.as_tensor(float(value))):
            found.append(f"log: {key} is {value}")
    return found


def main() -> int:
    """Try them; return 0 if all is well."""
    args = part_options("smoke", __doc__).parse_args()
    deadline = time.monotonic() + args.seconds
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    results: List[Dict[str, Any]] = []
    left: List[str] = []
    for optimizer, mode in cases(args.device):
        begin = time.monotonic()
        if begin > deadline - 2:
            left.append(f"{optimizer} {mode}")
            continue
        try:
            wrong = faults(optimizer, mode, args.device)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            wrong = [f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"]
        seconds = round(time.monotonic() - begin, 2)
        results.append(
            {"optimizer": optimizer, "precision": mode, "seconds": seconds, "faults": wrong}
        )
        write(args, results, left)
    write(args, results, left)
    return 1 if any(r["faults"] for r in results) else 0


def write(args: Any, results: List[Dict[str, Any]], left: List[str]) -> None:
    """Write both forms."""
    atomic_write(
        args.out / "smoke.json", json.dumps({"results": results, "no_time": left}, indent=1)
    )
    modes = list(dict.fromkeys(r["precision"] for r in results))
    cells = {(r["optimizer"], r["precision"]): r for r in results}
    rows = []
    for optimizer in dict.fromkeys(r["optimizer"] for r in results):
        row = [cells.get((optimizer, mode)) for mode in modes]
        rows.append([optimizer, *("" if c is None else "no" if c["faults"] else "ok" for c in row)])
    bad = [r for r in results if r["faults"]]
    text = f"{len(results) - len(bad)} of {len(results)} are well.\n\n"
    text += markdown_table(["optimizer", *modes], rows) + "\n"
    for r in bad:
        text += f"\n- {r['optimizer']}, {r['precision']}: {'; '.join(r['faults'])}\n"
    if left:
        text += f"\nNo time was left for: {', '.join(left)}.\n"
    atomic_write(args.work / "smoke.md", text)


if __name__ == "__main__":
    sys.exit(main())
