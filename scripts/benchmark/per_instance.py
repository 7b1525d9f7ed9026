"""Compare SAM's and delta-SAM's steps with that of per-instance perturbation, along a run.

    python -m scripts.benchmark.per_instance MODEL TSV --out docs/results/per_instance_trec

MODEL is an encoder of Hugging Face's, TSV has columns sentence and label. It is trained on rows of
which a share has wrong labels; at the end of every epoch the same mini-batches are taken, in eval
mode, and for each method, at the weights w of that moment, its gradient of the step is compared
with that of per-instance perturbation (Zhou et al., Eq. 2), which is computed exactly:

    g_inst = mean_j grad l_j(w + rho grad l_j / ||grad l_j||)

by the cosine and by ||g - g_inst|| / ||g_inst||. Beside it the rise of the loss at the method's own
perturbation: the mean over the sentences (R_batch for SAM, R_inst for per-instance), and weighted
as in the ascent (R_s). Writes OUT.md and OUT.csv, again at the end of every epoch.
"""

import argparse
import csv
import io
import math
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_fairseq.algorithms import draw_direction_, probe_generator, sam_ascent_
from deltasam_fairseq.algorithms.sharpness import Landscape, Writer, cosine, losses_at
from deltasam_fairseq.core import DeltaWeighting, GibbsWeighting, SwappedWeights, Weighting
from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.glue.training_rows import draw_rows, replace_labels
from deltasam_fairseq.markdown import markdown_table
from deltasam_fairseq.pytorch import SharpnessAware

SIZE, MEASURED = 16, 4  # sentences of a mini-batch; mini-batches that are measured
LR, WARMUP, EPOCHS = 1e-4, 0.06, 10
FIGURES = ("cosine", "distance", "rise", "weighted rise")
SEED = 1


class Step(NamedTuple):
    """What a method makes of a mini-batch: the gradient of its step, and two rises of the loss."""

    gradient: List[Tensor]
    rise: float
    weighted_rise: float


class Classifier:
    """An encoder of Hugging Face's with a classification head, as functions of its weights.

    Args:
        path: its folder.
        classes: labels that there are.
    """

    def __init__(self, path: str, classes: List[str]) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(SEED)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(classes)
        )
        self.number = {label: i for i, label in enumerate(classes)}
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self._moved = SwappedWeights()

    def losses(self, rows: List[Dict[str, str]]) -> Tensor:
        """Return the loss of every row, shape (B,)."""
        texts = self.tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([self.number[row["label"]] for row in rows])
        return F.cross_entropy(self.model(**texts).logits, labels, reduction="none")

    def landscape(self, rows: List[Dict[str, str]]) -> Landscape:
        """Return the losses of some rows as a function of the weights, in eval mode."""

        def at(write: Optional[Writer]) -> Tensor:
            return self.at(write, lambda: self.losses(rows).detach())

        def gradient(c: Tensor) -> List[Tensor]:
            return list(torch.autograd.grad((c.float() * self.losses(rows)).sum(), self.weights))

        return Landscape(self._moved.values(self.weights), at, gradient)

    def at(self, write: Optional[Writer], function: Callable[[], Any]) -> Any:
        """Return what ``function`` returns with the weights that ``write`` writes."""
        try:
            if write is not None:
                self._moved.move(self.weights, write)
            return function()
        finally:
            self._moved.restore()

    def step(self, rows: List[Dict[str, str]], rho: float, weighting: Weighting, draw: int) -> Step:
        """Return the step of SAM's form: one perturbation for all rows.

        Args:
            rho: radius of the perturbation, 0 for none.
            weighting: of the rows in the ascent.
            draw: number of the probe's direction.
        """
        here = self.landscape(rows)
        clean = here.losses(None).double()
        weights = torch.ones_like(clean)
        if weighting.probes:
            u = [torch.empty_like(w) for w in self.weights]
            generator = probe_generator(SEED, draw, self.weights[0].device)
            draw_direction_(u, generator)
            weighting.shape_direction_(u)
            a = losses_at(here, u, rho) - clean
            weights = weighting.weigh(a, lambda figures, op="sum": None).weights
        direction = here.gradient(weights / len(rows))

        def write(out: List[Tensor]) -> None:
            sam_ascent_(out, here.weights, direction, rho)

        rises = here.losses(write).double() - clean
        mean = torch.full_like(clean, 1 / len(rows))
        gradient = self.at(write, lambda: here.gradient(mean))
        return Step(gradient, float(rises.mean()), float((weights * rises).mean()))

    def groups(self, rows: List[Dict[str, str]], size: int, rho: float) -> Step:
        """Return the step of m-sharpness: a perturbation for every ``size`` rows."""
        steps = [
            self.step(rows[i : i + size], rho, Weighting(), 0) for i in range(0, len(rows), size)
        ]
        gradient = [torch.stack(parts).mean(0) for parts in zip(*(s.gradient for s in steps))]
        rise = sum(step.rise for step in steps) / len(steps)
        return Step(gradient, rise, rise)


def methods(rho: float, betas: List[float], lambdas: List[float]) -> Dict[str, Callable[..., Step]]:
    """Return the methods, by name: from the classifier, rows and number of the draw to the step."""
    found: Dict[str, Callable[..., Step]] = {
        "Adam": lambda model, rows, _: model.step(rows, 0.0, Weighting(), 0),
        "SAM": lambda model, rows, _: model.step(rows, rho, Weighting(), 0),
        "m-sharpness, M = 4": lambda model, rows, _: model.groups(rows, 4, rho),
    }
    weightings: Dict[str, Weighting] = {f"delta-SAM, beta {b:g}": DeltaWeighting(b) for b in betas}
    weightings.update({f"RW-SAM, lambda {v:g}": GibbsWeighting(v) for v in lambdas})
    for name, weighting in weightings.items():
        found[name] = lambda model, rows, draw, w=weighting: model.step(rows, rho, w, draw)
    return found


def measure(model: Classifier, batches: List[Any], args: Any, epoch: int) -> Iterator[List[Any]]:
    """Return rows of the CSV file, of the weights as they are."""
    model.model.eval()
    for rho in args.rho:
        for number, rows in enumerate(batches):
            exact = model.groups(rows, 1, rho)
            size = math.sqrt(sum(float(g.double().square().sum()) for g in exact.gradient))
            draw = epoch * MEASURED + number
            yield [epoch, rho, number, "per-instance", 1.0, 0.0, exact.rise, exact.weighted_rise]
            for name, make in methods(rho, args.beta, args.gibbs_lambda).items():
                step = make(model, rows, draw)
                gap = sum(
                    float((a - b).double().square().sum())
                    for a, b in zip(step.gradient, exact.gradient)
                )
                figures = float(cosine(step.gradient, exact.gradient)), math.sqrt(gap) / size
                yield [epoch, rho, number, name, *figures, step.rise, step.weighted_rise]
    model.model.train()


def write(out: Path, found: List[List[Any]]) -> None:
    """Write all figures as CSV, and their means over mini-batches and epochs as tables."""
    table = io.StringIO()
    rows_of_file = csv.writer(table, lineterminator="\n")
    rows_of_file.writerow(["epoch", "rho", "mini-batch", "method", *FIGURES])
    rows_of_file.writerows([*row[:4], *(f"{v:.6g}" for v in row[4:])] for row in found)
    atomic_write(Path(f"{out}.csv"), table.getvalue())
    parts: List[str] = []
    for rho in dict.fromkeys(row[1] for row in found):
        rows = []
        for name in dict.fromkeys(row[3] for row in found):
            own = torch.tensor([r[4:] for r in found if r[1] == rho and r[3] == name]).double()
            sam = torch.tensor([r[4] for r in found if r[1] == rho and r[3] == "SAM"]).double()
            ahead = int((own[:, 0] > sam).sum())
            mean, spread = own.mean(0), own[:, 0].std()
            counted = "" if name in ("SAM", "per-instance") else f"{ahead} of {len(own)}"
            cells = [f"{mean[0]:.4f} +- {spread:.4f}", counted, *(f"{m:.4f}" for m in mean[1:])]
            rows.append([name, *cells])
        columns = ["method", "cosine", "above SAM's", *FIGURES[1:]]
        parts.append(f"rho {rho:g}:\n\n{markdown_table(columns, rows)}\n")
    atomic_write(Path(f"{out}.md"), "\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.per_instance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", help="folder of an encoder of Hugging Face's")
    parser.add_argument("tsv", type=Path, help="file with columns sentence and label")
    parser.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.csv are written")
    parser.add_argument("--rows", type=int, default=1000, help="rows to train on")
    parser.add_argument("--noise", type=float, default=0.4, help="share with a wrong label, 0 to 1")
    parser.add_argument("--along", choices=("adam", "sam", "delta_sam"), default="sam",
                        help="method of the run")  # fmt: skip
    parser.add_argument("--along-rho", type=float, default=0.1, help="rho of the run")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.1], help="to compare at")
    parser.add_argument("--beta", type=float, nargs="+", default=[1, 3, 10, 30])
    parser.add_argument("--gibbs-lambda", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the run")
    args = parser.parse_args()
    with open(args.tsv, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        kept = [rows[i] for i in draw_rows(len(rows), args.rows, SEED)]
        classes = sorted({row["label"] for row in rows})
        labels, _ = replace_labels([row["label"] for row in kept], classes, args.noise, SEED)
    except (KeyError, ValueError) as error:
        parser.error(f"{args.tsv}: {error}")
    data = [{"sentence": row["sentence"], "label": y} for row, y in zip(kept, labels)]
    model = Classifier(args.model, classes)
    batches = [data[i * SIZE : (i + 1) * SIZE] for i in range(MEASURED)]
    method = "sam" if args.along == "adam" else args.along
    rho = 0.0 if args.along == "adam" else args.along_rho
    sam = SharpnessAware(model.model, method=method, rho=rho)
    optimizer = torch.optim.AdamW(
        model.weights, lr=LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
    )
    total = args.epochs * math.ceil(len(data) / SIZE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(max(n, 1) / (WARMUP * total), (total - n) / ((1 - WARMUP) * total)),
    )
    found, start = list(measure(model, batches, args, 0)), time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        for numbers in torch.randperm(len(data)).split(SIZE):
            batch = [data[i] for i in numbers]
            sam.backward(lambda: model.losses(batch))  # noqa: B023
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found += measure(model, batches, args, epoch)
        write(args.out, found)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch} of {args.epochs}, {seconds:.0f} s, {sam.figures()}", flush=True)
    print(Path(f"{args.out}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
