"""Fine-tune a Hugging Face model on SST-2 with Adam, SAM and delta-SAM; one process or torchrun."""

import csv
import os
import sys
import time
from typing import Any, Dict

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deltasam_fairseq.markdown import markdown_table
from deltasam_fairseq.pytorch import SharpnessAware

METHODS: Dict[str, Dict[str, Any]] = {
    "Adam": {"method": "sam", "rho": 0.0},
    "SAM": {"method": "sam", "rho": 0.02},
    "delta-SAM": {"method": "delta_sam", "rho": 0.02, "beta": 3.0},
}
BATCH, LR, RANK, WORLD = 16, 1e-4, int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))


def train(method: str, path: str, train_rows: list, dev_rows: list) -> list:
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    bare = model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    if WORLD > 1:
        model = DistributedDataParallel(bare)

    def outputs(model: torch.nn.Module, rows: list) -> tuple:
        batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
        labels, logits = torch.tensor([int(r["label"]) for r in rows]), model(**batch).logits
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    sam, start = SharpnessAware(model, **METHODS[method]), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    bare.train()
    for rows in torch.randperm(len(train_rows) // WORLD * WORLD).split(BATCH):
        own = [train_rows[i] for i in rows[RANK::WORLD]]
        sam.backward(lambda: outputs(model, own)[0])  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    bare.eval()
    with torch.no_grad():
        loss, right = map(torch.cat, zip(*(outputs(bare, [row]) for row in dev_rows)))
    return [method, f"{right.float().mean():.3f}", f"{loss.mean():.3f}", f"{seconds:.0f} s"]


if __name__ == "__main__":
    model, data, count = sys.argv[1:]  # the folders of both, and how many rows to train on
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    rows = [list(csv.DictReader(open(f"{data}/{s}.tsv"), delimiter="\t")) for s in ("train", "dev")]
    table = [train(method, model, rows[0][: int(count)], rows[1]) for method in METHODS]
    if RANK == 0:
        print(markdown_table(["method", "dev accuracy", "dev loss", "time"], table))
