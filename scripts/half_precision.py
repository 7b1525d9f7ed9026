"""What half precision leaves of delta-SAM's probe and of the ascent, measured on a checkpoint.

    python scripts/half_precision.py DATA --path checkpoint.pt --out docs/half_precision

For each rho, against float64 on the same sentences, weights and random direction:

- probe: total variation between g (Eq. 4) and the float64 g, and the correlation of a_j (Eq. 3);
  with the literal radius rho, and with the radius of the rule;
- ascent: the rise of the loss, evaluated in float64, relative to that of the exact eps*; with
  the step rounded to nearest, and stochastically (mean and standard deviation of one rounding);
  and the share realised along eps*.

amp is what --amp does on a GPU, by the autocast of a CPU to float16: float32 weights, rounded to
values that the cast in a product leaves alone.

Writes OUT.md (the table), OUT.json and OUT.png (a_j at the probe over the radius). The model
runs in eval mode, on the CPU; all of it is the plugin's own code but for the nearest rounding.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch
from fairseq import checkpoint_utils
from torch import Tensor
from torch.nn import Parameter

import deltasam_fairseq  # noqa: F401  registers and makes loading safe
from deltasam_fairseq.algorithms import draw_direction_, guardedness, probe_generator
from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.optim import DeltaSAMConfig, SharpnessAwareOptimizer

# What the weights are kept in, and what a product multiplies them in.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "amp": (torch.float32, torch.float16),
}
SEED = 1


class Measured(NamedTuple):
    dtype: str
    rho: float
    radius: float
    tv_literal: float
    tv_rule: float
    correlation_literal: float
    correlation_rule: float
    rise_nearest: float
    rise_stochastic: float
    scatter: float
    realised: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="data folder of the checkpoint's task")
    parser.add_argument("--path", required=True, help="fairseq checkpoint")
    parser.add_argument("--valid-subset", default="valid", help="split to take sentences from")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences of the batch")
    parser.add_argument("--sam-rho-list", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--draws", type=int, default=3, help="probes that are averaged")
    parser.add_argument("--roundings", type=int, default=20, help="rounded steps that are averaged")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the files written")
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

    def sam(self, rho: float, radius: Any = None) -> SharpnessAwareOptimizer:
        options = DeltaSAMConfig(sam_rho=rho, delta_sam_probe_radius=radius)
        optimizer = _Detached(options, self.params)
        optimizer.compute_in(self.dtype, self.masters)
        return optimizer

    def losses(self) -> Tensor:
        with torch.autocast(
            "cpu", dtype=self.dtype if self.autocast else None, enabled=self.autocast
        ):
            return per_sentence_losses(self.criterion, self.model, self.sample).losses

    def guardedness(self, rho: float, radius: Any, draw: int) -> Any:
        sam = self.sam(rho, radius)
        signs = sam.probe_signs if radius is None else (1.0,)
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
        u = [torch.empty_like(p, dtype=torch.float32) for p in self.params]
        norm = draw_direction_(u, probe_generator(SEED, draw, u[0].device))
        before = [p.data for p in self.params]
        with torch.no_grad():
            clean = self.losses()
            for p, x in zip(self.params, u):
                p.data = p.data + rho * x.to(p.dtype) / norm
            probed = self.losses()
        for p, value in zip(self.params, before):
            p.data = value
        return guardedness(clean, probed)

    def gradient(self) -> List[Tensor]:
        self.model.zero_grad()
        scale = 128.0 if self.dtype == torch.float16 else 1.0
        (self.losses().sum() * scale).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]


class _Detached(SharpnessAwareOptimizer):
    """The plugin's probe and ascent without a base optimizer."""

    base_name = "none"

    @staticmethod
    def base_class(cfg: Any, params: Any) -> Any:  # type: ignore[override]
        return None


def loss_in_float64(exact: Model, values: List[Tensor]) -> float:
    """Mean loss, in float64, when the weights take these values."""
    before = [p.data for p in exact.params]
    with torch.no_grad():
        for p, value in zip(exact.params, values):
            p.data = value.double()
        loss = exact.losses().mean()
        for p, value in zip(exact.params, before):
            p.data = value
    return loss.item()


def measure(
    exact: Model, model: Model, name: str, rho: float, draws: int, roundings: int
) -> Measured:
    """All figures of one precision at one rho."""
    sums: Dict[str, List[float]] = {}

    def note(key: str, value: Any) -> None:
        sums.setdefault(key, []).append(float(value))

    for draw in range(draws):
        a64 = exact.exact_guardedness(rho, draw)
        g64 = a64.abs() / a64.abs().sum()
        for kind, given in (("literal", rho), ("rule", None)):
            a, radius = model.guardedness(rho, given, draw)
            g = a.abs() / a.abs().sum()
            note(f"tv_{kind}", (g - g64).abs().sum() / 2)
            note(f"correlation_{kind}", torch.corrcoef(torch.stack((a, a64)))[0, 1])
        note("radius", radius)

    grads = exact.gradient()
    norm = torch.stack([g.norm() for g in grads]).norm()
    steps = [rho * g / norm for g in grads]
    clean = loss_in_float64(exact, [p.data for p in exact.params])
    whole = loss_in_float64(exact, [p.data + s for p, s in zip(exact.params, steps)]) - clean
    own = model.gradient()
    own_norm = torch.stack([g.double().norm() for g in own]).norm()
    nearest = [
        (p.data.float() + (g.float() * (rho / own_norm).float())).to(model.dtype)
        for p, g in zip(exact.params, own)
    ]
    note("rise_nearest", (loss_in_float64(exact, nearest) - clean) / whole)
    for draw in range(roundings if torch.finfo(model.dtype).bits < 32 else 1):
        sam = model.sam(rho)
        ascent = sam.ascend(model.params, SEED, draw)
        note("realised", ascent.realised)
        note(
            "rise_stochastic",
            (loss_in_float64(exact, [p.data for p in model.params]) - clean) / whole,
        )
        sam.restore()
    scatter = float(torch.tensor(sums["rise_stochastic"]).std(unbiased=False))
    means = {k: sum(v) / len(v) for k, v in sums.items()}
    return Measured(name, rho, scatter=scatter, **means)


def table(rows: List[Measured], command: str, size: int, sentences: int) -> str:
    head = (
        "| dtype | rho | TV, radius rho | TV, rule | corr., radius rho | corr., rule | radius "
        "| rise, nearest | rise, stochastic | scatter | realised |\n" + "|---" * 11 + "|\n"
    )
    body = "".join(
        f"| {r.dtype} | {r.rho:g} | {r.tv_literal:.3f} | {r.tv_rule:.3f} "
        f"| {r.correlation_literal:.3f} | {r.correlation_rule:.4f} | {r.radius:.3g} "
        f"| {r.rise_nearest:.3f} | {r.rise_stochastic:.3f} | {r.scatter:.3f} | {r.realised:.3f} |\n"
        for r in rows
    )
    return f"{size / 1e6:.1f}M weights, {sentences} sentences: `{command}`\n\n{head}{body}"


def plot(exact: Model, models: Dict[str, Model], rho: float, out: Path) -> None:
    """Total variation of g over the radius of the probe, a line a precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    radii = [0.01 * 10 ** (i / 4) for i in range(18)]
    a64 = exact.exact_guardedness(rho, 0)
    g64 = a64.abs() / a64.abs().sum()
    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for name, model in models.items():
        tv = []
        for radius in radii:
            a, _ = model.guardedness(rho, radius, 0)
            tv.append(float((a.abs() / a.abs().sum() - g64).abs().sum() / 2))
        (line,) = axes.plot(radii, tv, marker="o", markersize=3, label=name)
        _, rule = model.guardedness(rho, None, 0)
        axes.axvline(rule, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="radius of the probe (dotted: the rule)")
    axes.set_ylabel(f"TV of g from float64 at rho {rho:g}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main() -> None:
    args = arguments()
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.path], {"data": args.data}
    )
    model.eval()
    criterion = task.build_criterion(cfg.criterion)
    criterion.eval()
    task.load_dataset(args.valid_subset)
    dataset = task.dataset(args.valid_subset)
    sample = dataset.collater([dataset[i] for i in range(min(args.batch_size, len(dataset)))])
    exact = Model(model, criterion, sample, torch.float64, torch.float64)
    models = {name: Model(model, criterion, sample, *each) for name, each in PRECISIONS.items()}
    rows = []
    for name, each in models.items():
        for rho in args.sam_rho_list:
            rows.append(measure(exact, each, name, rho, args.draws, args.roundings))
            print(f"{name} rho {rho:g}: {rows[-1]._asdict()}", file=sys.stderr, flush=True)
    size = sum(p.numel() for p in exact.params)
    shown = ["--path", Path(args.path).name, "--batch-size", str(args.batch_size)]
    command = " ".join(["python scripts/half_precision.py DATA", *shown])
    text = table(rows, command, size, len(sample["target"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.md").write_text(text)
    Path(f"{args.out}.json").write_text(json.dumps([r._asdict() for r in rows], indent=1))
    if not args.no_plot:
        plot(exact, models, args.sam_rho_list[-1], Path(f"{args.out}.png"))
    print(text)


if __name__ == "__main__":
    main()
