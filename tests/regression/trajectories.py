"""Recorded trajectories on the small RoBERTa: what is recorded, and how it is recorded again.

    python -m tests.regression.trajectories                  record, and say what changed
    python -m tests.regression.trajectories --fixture WORK   make the fixture itself first

WORK is the ``work`` folder of the quick start (``make demo``): its pretrained RoBERTa and its
word-order task become the checkpoint (in float16, to be small) and the data of this folder; the
sentences come from Python's documentation (PSF licence). Record
again only when a change of the numbers is meant, and say why in the commit.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import torch
from fairseq import checkpoint_utils

from tests.helpers import tiny

HERE = Path(__file__).parent

CHECKPOINT, DATA, RECORD = HERE / "small_roberta.pt", HERE / "data", HERE / "trajectories.json"
SENTENCES = {"train": 96, "valid": 32}
UPDATES = 12
RUNS = {
    "adam": ["--optimizer", "adam"],
    "sam_adam": ["--optimizer", "sam_adam"],
    "asam_adam": ["--optimizer", "sam_adam", "--sam-adaptive", "--sam-rho", "0.5"],
    "delta_sam_adam": ["--optimizer", "delta_sam_adam"],
    "delta_sam_adam, update_freq 2": ["--optimizer", "delta_sam_adam", "--update-freq", "2"],
    "delta_sam_sgd": ["--optimizer", "delta_sam_sgd", "--lr", "0.05"],
}


def run(name: str) -> Dict[str, Any]:
    """Twelve updates: loss of each as logged, and checksums of the weights at the end.

    A checksum is the norm, and the sum with alternating signs, of the change of all weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = tiny.arguments(DATA, Path(folder), "--lr", "5e-4", "--dropout", "0.1")
        argv += [*_architecture(), "--finetune-from-model", str(CHECKPOINT), *RUNS[name]]
        trainer = tiny.build_trainer(argv)
        checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    before = torch.cat([w.flatten() for w in tiny.weights(trainer)]).double()
    samples, logs = tiny.batches(trainer), []
    micro_batches = trainer.cfg.optimization.update_freq[0]
    for update in range(UPDATES):
        at = update * micro_batches
        chosen = [samples[i % len(samples)] for i in range(at, at + micro_batches)]
        logs.append(trainer.train_step(chosen)["loss"])
    change = torch.cat([w.flatten() for w in tiny.weights(trainer)]).double() - before
    signs = torch.ones_like(change)
    signs[1::2] = -1
    return {
        "losses": [float(loss) for loss in logs],
        "change_norm": change.norm().item(),
        "change_alternating_sum": (change @ signs).item(),
    }


def _architecture() -> List[str]:
    return json.loads((HERE / "architecture.json").read_text())


def make_fixture(work: Path) -> None:
    """Cut the quick start's model and data down to what fits into a repository."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(work / "roberta" / "checkpoint_last.pt"))
    model = state["cfg"]["model"]
    layers = [f"--{k.replace('_', '-')}" for k in _SIZES]
    values = [str(getattr(model, k)) for k in _SIZES]
    arguments = [x for pair in zip(layers, values) for x in pair]
    (HERE / "architecture.json").write_text(json.dumps(arguments) + "\n")
    weights = {k: v.half() for k, v in state["model"].items()}
    kept = {"args": None, "cfg": None, "model": weights}
    kept["optimizer_history"] = state["optimizer_history"]
    torch.save({**kept, "extra_state": {"train_iterator": {"epoch": 1}}}, CHECKPOINT)
    (source,) = (work / "data").iterdir()
    from fairseq.data import data_utils

    shutil.rmtree(DATA, ignore_errors=True)
    for part in ("input0", "label"):
        for split, n in SENTENCES.items():
            rows = data_utils.load_indexed_dataset(str(source / part / split), None)
            tiny._write(DATA / part / split, [rows[i].tolist() for i in range(n)])
        shutil.copy(source / part / "dict.txt", DATA / part / "dict.txt")


_SIZES = (
    "max_positions",
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fixture", type=Path, metavar="WORK", help="make the fixture first")
    args = parser.parse_args()
    if args.fixture is not None:
        make_fixture(args.fixture)
    torch.set_num_threads(1)
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    after = {name: run(name) for name in RUNS}
    for name, found in after.items():
        old = before.get(name)
        print(f"{name}: {'unchanged' if found == old else f'{old} -> {found}'}")
    RECORD.write_text(json.dumps(after, indent=1) + "\n")


if __name__ == "__main__":
    main()
