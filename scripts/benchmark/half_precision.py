"""Measure on a checkpoint what half precision leaves of delta-SAM's probe and of the ascent.

    python -m scripts.benchmark.half_precision DATA --path checkpoint.pt --out docs/half_precision

For each rho, against float64 on the same sentences, weights and random direction:

- probe: total variation between g (Eq. 4) and the float64 g, and the correlation of a_j (Eq. 3);
  of the literal probe, with radius rho, and by the rule (mean, and the worst of all draws);
- ascent: the rise of the loss, evaluated in float64, relative to that of the exact eps*; with
  the step rounded to nearest, and stochastically (mean and standard deviation of one rounding);
  and the share realised along eps*.

amp is what --amp does on a GPU, by the autocast of a CPU to float16: float32 weights, rounded to
values that the cast in a product leaves alone.

Writes OUT.md (the table), OUT.json and OUT.png (total variation over the radius of the probe,
forward and central differences); with --factors OUT-factors.md alone. The model runs in eval mode,
on the CPU; all of it is the plugin's own code but for the nearest rounding.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils
from torch import Tensor
from torch.nn import Parameter

import deltasam_fairseq  # noqa: F401  registers and makes loading safe
from deltasam_fairseq.algorithms import (
    draw_direction_,
    global_norm,
    guardedness,
    probe_generator,
    unit_roundoff,
)
from deltasam_fairseq.core import Parts, Perturber, Radius
from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.markdown import markdown_table

# What the weights are kept in, and what a product multiplies them in.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "amp": (torch.float32, torch.float16),
}
SEED = 1
HEADER = (
    *("dtype", "rho", "TV, literal", "TV, rule", "worst", "corr., literal", "corr., rule"),
    *("radius", "rise, nearest", "rise, stochastic", "scatter", "realised"),
)
FORMATS = ("", "g", ".3f", ".3f", ".3f", ".3f", ".4f", ".3g", ".3f", ".3f", ".3f", ".3f")


class Measured(NamedTuple):
    """A row of the table, see `HEADER`."""

    dtype: str
    rho: float
    tv_literal: float
    tv_rule: float
    tv_worst: float
    correlation_literal: float
    correlation_rule: float
    radius: float
    rise_nearest: float
    rise_stochastic: float
    scatter: float
    realised: float


def options(program: str, description: str) -> argparse.ArgumentParser:
    """The options that say what is measured, and where the figures go."""
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.benchmark.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="data folder of the checkpoint's task")
    parser.add_argument("--path", required=True, help="fairseq checkpoint")
    parser.add_argument("--valid-subset", default="valid", help="split to take sentences from")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences of a batch")
    parser.add_argument("--batches", type=int, default=4, help="batches that are averaged")
    parser.add_argument("--draws", type=int, default=3, help="probes of each batch")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the files written")
    return parser


def arguments() -> argparse.Namespace:
    parser = options("half_precision", __doc__ or "")
    parser.add_argument("--sam-rho-list", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--roundings", type=int, default=10, help="rounded steps of each batch")
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=[],
        help="in place of all that: total variation at these factors of cbrt(eps) ||w||",
    )
    parser.add_argument("--no-plot", action="store_true", help="without OUT.png")
    return parser.parse_args()


class Model:
    """One precision of the model: its weights, its optimizer, its losses.

    In half precision the weights are rounded float32 masters, as in fairseq's FP16Optimizer.

    Args:
        model, criterion, sample: with weights in float32, in eval mode.
        kept_in: precision of the weights.
        dtype: precision of the products, under autocast if it is another.
    """

    def __init__(
        self, model: Any, criterion: Any, sample: Any, kept_in: torch.dtype, dtype: torch.dtype
    ) -> None:
        self.model, self.criterion = copy.deepcopy(model).to(kept_in), criterion
        self.sample, self.dtype = sample, dtype
        self.autocast = kept_in != dtype
        self.params: List[Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        originals = [p for p in model.parameters() if p.requires_grad]
        masters = {p: o.data.float() for p, o in zip(self.params, originals)}
        self.masters = masters if torch.finfo(kept_in).bits < 32 else None
        self._exact: Dict[Tuple[float, int], Tensor] = {}

    def sam(self, rho: float, radius: Any = None) -> Perturber:
        perturber = Perturber(Parts(Radius(rho)), probe_radius=radius)
        perturber.compute_in(self.dtype, self.masters)
        return perturber

    def losses(self) -> Tensor:
        with torch.autocast(
            "cpu", dtype=self.dtype if self.autocast else None, enabled=self.autocast
        ):
            return per_sentence_losses(self.criterion, self.model, self.sample).losses

    def guardedness(
        self, rho: float, radius: Optional[float], draw: int, signs: Tuple[float, ...] = ()
    ) -> Tuple[Tensor, float]:
        """``a_j`` and the radius, as the plugin probes but for radius or signs that are given."""
        sam = self.sam(rho, radius)
        signs = signs or sam.probe_signs
        with torch.no_grad():
            clean = self.losses()
            total = torch.zeros_like(clean, dtype=torch.float64)
            for sign in signs:
                used = sam.probe(self.params, SEED, draw, sign)
                total = total + sign * guardedness(clean, self.losses()) / len(signs)
                sam.restore()
        return total, float(used)

    def exact_guardedness(self, rho: float, draw: int) -> Tensor:
        """Eq. 3 in the precision of this model, with the direction that float32 draws."""
        if (rho, draw) not in self._exact:
            u = [torch.empty_like(p, dtype=torch.float32) for p in self.params]
            norm = draw_direction_(u, probe_generator(SEED, draw, u[0].device))
            probed = [p.data + rho * x.to(p.dtype) / norm for p, x in zip(self.params, u)]
            own = self.losses_at([p.data for p in self.params])
            self._exact[rho, draw] = guardedness(own, self.losses_at(probed))
        return self._exact[rho, draw]

    @torch.no_grad()
    def losses_at(self, values: List[Tensor]) -> Tensor:
        """The losses when the weights take these values, in their own precision."""
        before = [p.data for p in self.params]
        for p, value in zip(self.params, values):
            p.data = value.to(p.dtype)
        losses = self.losses()
        for p, value in zip(self.params, before):
            p.data = value
        return losses

    def gradient(self) -> List[Tensor]:
        self.model.zero_grad()
        scale = 128.0 if self.dtype == torch.float16 else 1.0
        (self.losses().sum() * scale).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]


def measure(
    pairs: Sequence[Tuple[Model, Model]], name: str, rho: float, draws: int, roundings: int
) -> Measured:
    """All figures of one precision at one rho, over batches.

    Args:
        pairs: the model in float64 and in the precision, each with the same batch.
    """
    found: Dict[str, List[float]] = {}

    def note(key: str, value: Any) -> None:
        found.setdefault(key, []).append(float(value))

    scatters = []
    for exact, model in pairs:
        _measure_probe(exact, model, rho, draws, note)
        roundings = roundings if torch.finfo(model.dtype).bits < 32 else 1
        rises = _measure_ascent(exact, model, rho, roundings, note)
        scatters.append(float(torch.tensor(rises).var(unbiased=False)))
    means = {key: sum(values) / len(values) for key, values in found.items()}
    scatter = (sum(scatters) / len(scatters)) ** 0.5
    return Measured(name, rho, tv_worst=max(found["tv_rule"]), scatter=scatter, **means)


def _measure_probe(exact: Model, model: Model, rho: float, draws: int, note: Any) -> None:
    for draw in range(draws):
        a64 = exact.exact_guardedness(rho, draw)
        for kind, given, signs in (("literal", rho, (1.0,)), ("rule", None, ())):
            a, radius = model.guardedness(rho, given, draw, signs)
            note(f"tv_{kind}", total_variation(a, a64))
            note(f"correlation_{kind}", torch.corrcoef(torch.stack((a, a64)))[0, 1])
        note("radius", radius)


def _measure_ascent(
    exact: Model, model: Model, rho: float, roundings: int, note: Any
) -> List[float]:
    weights = [p.data for p in exact.params]
    grads = exact.gradient()
    norm = torch.stack([g.norm() for g in grads]).norm()
    clean = exact.losses_at(weights).mean()

    def rise(values: List[Tensor]) -> float:
        return float(exact.losses_at(values).mean() - clean)

    whole = rise([w + rho * g / norm for w, g in zip(weights, grads)])
    own = model.gradient()
    own_norm = torch.stack([g.double().norm() for g in own]).norm()
    scale = (rho / own_norm).float()
    nearest = [(w.float() + g.float() * scale).to(model.dtype) for w, g in zip(weights, own)]
    note("rise_nearest", rise(nearest) / whole)
    rises = []
    for draw in range(roundings):
        sam = model.sam(rho)
        note("realised", sam.ascend(model.params, SEED, draw).realised)
        rises.append(rise([p.data for p in model.params]) / whole)
        note("rise_stochastic", rises[-1])
        sam.restore()
    return rises


def total_variation(a: Tensor, b: Tensor) -> float:
    """Between the ``g`` (Eq. 4) of two ``a``."""
    return float((a.abs() / a.abs().sum() - b.abs() / b.abs().sum()).abs().sum() / 2)


def table(rows: List[Measured], command: str, size: int, sentences: int) -> str:
    cells = [[format(value, spec) for value, spec in zip(row, FORMATS)] for row in rows]
    facts = f"{size / 1e6:.1f}M weights, {sentences} sentences: `{command}`"
    return f"{facts}\n\n{markdown_table(HEADER, cells)}\n"


def factor_table(
    pairs: Dict[str, List[Tuple[Model, Model]]], rho: float, factors: Sequence[float], draws: int
) -> str:
    """Total variation of central differences at multiples of ``cbrt(eps) ||w||``: mean, worst."""
    rows = []
    for name, of_batches in pairs.items():
        if torch.finfo(of_batches[0][1].dtype).bits == 32:
            continue
        row = [name]
        for factor in factors:
            found = []
            for exact, model in of_batches:
                unit = unit_roundoff(model.dtype) ** (1 / 3) * float(global_norm(model.params))
                for draw in range(draws):
                    a, _ = model.guardedness(rho, factor * unit, draw)
                    found.append(total_variation(a, exact.exact_guardedness(rho, draw)))
            row.append(f"{sum(found) / len(found):.3f} ({max(found):.3f})")
        rows.append(row)
        print(*row, file=sys.stderr, flush=True)
    return markdown_table(["factor", *(f"{f:g}" for f in factors)], rows) + "\n"


def plot(exact: Model, models: Dict[str, Model], rho: float, out: Path) -> None:
    """Total variation of g over the radius of the probe, central and forward differences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    radii = [0.01 * 10 ** (i / 4) for i in range(18)]
    a64 = exact.exact_guardedness(rho, 0)
    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for color, (name, model) in enumerate(models.items()):
        for label, line, signs in (("", "-", (1.0, -1.0)), (", forward", ":", (1.0,))):
            probes = [model.guardedness(rho, radius, 0, signs) for radius in radii]
            tv = [total_variation(a, a64) for a, _ in probes]
            axes.plot(
                radii, tv, line, marker="o", markersize=3, color=f"C{color}", label=name + label
            )
        a, radius = model.guardedness(rho, None, 0)
        axes.plot(radius, total_variation(a, a64), "*", markersize=14, color=f"C{color}")
    axes.set(xscale="log", yscale="log", xlabel="radius of the probe (star: the rule)")
    axes.set_ylabel(f"TV of g from float64 at rho {rho:g}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def load(args: argparse.Namespace) -> Dict[str, List[Tuple[Model, Model]]]:
    """The model in float64 and in each of `PRECISIONS`, one pair a batch."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.path], {"data": args.data}
    )
    model.eval()
    criterion = task.build_criterion(cfg.criterion)
    criterion.eval()
    task.load_dataset(args.valid_subset)
    dataset = task.dataset(args.valid_subset)
    pairs: Dict[str, List[Tuple[Model, Model]]] = {name: [] for name in PRECISIONS}
    n = min(args.batch_size, len(dataset))
    for first in range(0, n * min(args.batches, len(dataset) // n), n):
        sample = dataset.collater([dataset[i] for i in range(first, first + n)])
        exact = Model(model, criterion, sample, torch.float64, torch.float64)
        for name, each in PRECISIONS.items():
            pairs[name].append((exact, Model(model, criterion, sample, *each)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return pairs


def main() -> None:
    args = arguments()
    pairs = load(args)
    if args.factors:
        text = factor_table(pairs, args.sam_rho_list[-1], args.factors, args.draws)
        Path(f"{args.out}-factors.md").write_text(text)
        print(text)
        return
    rows = []
    for name, each_batch in pairs.items():
        for rho in args.sam_rho_list:
            rows.append(measure(each_batch, name, rho, args.draws, args.roundings))
            print(f"{name} rho {rho:g}: {rows[-1]._asdict()}", file=sys.stderr, flush=True)
    exact, _ = pairs["fp32"][0]
    size, batches = sum(p.numel() for p in exact.params), len(pairs["fp32"])
    n = exact.sample["nsentences"]
    counts = {"batch-size": n, "batches": batches, "draws": args.draws, "roundings": args.roundings}
    command = "python -m scripts.benchmark.half_precision DATA --path "
    command += f"{Path(args.path).name} --out OUT"
    command += "".join(f" --{name} {value}" for name, value in counts.items())
    text = table(rows, command, size, n * batches)
    Path(f"{args.out}.md").write_text(text)
    Path(f"{args.out}.json").write_text(json.dumps([r._asdict() for r in rows], indent=1))
    if not args.no_plot:
        models = {name: each_batch[0][1] for name, each_batch in pairs.items()}
        plot(pairs["fp32"][0][0], models, args.sam_rho_list[-1], Path(f"{args.out}.png"))
    print(text)


if __name__ == "__main__":
    main()
