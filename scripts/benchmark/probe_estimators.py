"""Other estimates of delta-SAM's a_j (Eq. 3) in half precision than the plugin's, measured.

    python -m scripts.benchmark.probe_estimators DATA --path checkpoint.pt --out OUT

For each estimator and each radius, a multiple of cbrt(eps) ||w||: total variation between its g
(Eq. 4) and the float64 g, mean and largest over batches and draws. A forward difference makes one
forward without graph less than the plugin's central difference where there is one micro-batch, a
reflection draws no direction for the second side. For sentence_prediction, on the CPU, in eval
mode; writes OUT.md. What came out: docs/half_precision.md.
"""

import copy
import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_fairseq.algorithms import global_norm, unit_roundoff
from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.half_precision import SEED, Model, load, options, total_variation

PRECISIONS = ("fp16", "bf16")


class Sides(NamedTuple):
    """Losses of a batch around w, float64, shape (B,).

    Attributes:
        clean, ahead, behind, near: at w, w + R u, w - R u and w - R u / 2, each rounded.
        reflected: at 2 q(w) - q(w + R u), q the rounding; u is not needed for it.
        linear: clean, and to first order what the change of the logits to ahead adds.
        wide_clean, wide_ahead: of the same rounded weights, multiplied in float32.
    """

    clean: Tensor
    ahead: Tensor
    behind: Tensor
    near: Tensor
    reflected: Tensor
    linear: Tensor
    wide_clean: Tensor
    wide_ahead: Tensor

    @property
    def curvature(self) -> Tensor:
        return (self.ahead + self.behind) / 2 - self.clean

    @property
    def fitted_curvature(self) -> Tensor:
        """What of the curvature the clean losses explain, fitted on this very batch."""
        p = (-self.clean).exp()
        features = torch.stack([torch.ones_like(p), p, p * self.clean], dim=1)
        return features @ torch.linalg.lstsq(features, self.curvature[:, None]).solution[:, 0]


# a_j up to a factor, from a draw and the other draws on the same batch.
ESTIMATORS: Dict[str, Callable[[Sides, List[Sides]], Tensor]] = {
    "central difference": lambda s, _: s.ahead - s.behind,
    "central, second side reflected": lambda s, _: s.ahead - s.reflected,
    "sides R and R / 2": lambda s, _: s.ahead - s.near,
    "forward difference": lambda s, _: s.ahead - s.clean,
    "forward, linear in the logits": lambda s, _: s.linear - s.clean,
    "forward, products in float32": lambda s, _: s.wide_ahead - s.wide_clean,
    "forward, curvature fitted to the losses": lambda s, _: s.ahead - s.clean - s.fitted_curvature,
    "forward, curvature of the other draws": lambda s, others: (
        s.ahead - s.clean - torch.stack([o.curvature for o in others]).mean(dim=0)
    ),
}


def losses(model: Model, module: Any) -> Tuple[Tensor, Tensor]:
    """Losses and logits of a sentence_prediction batch, float64."""
    seen: List[Tensor] = []
    with module.register_forward_hook(lambda *call: seen.append(call[2][0].double())):
        found = per_sentence_losses(model.criterion, module, model.sample).losses
    return found.double(), seen[0]


@torch.no_grad()
def sides(model: Model, radius: float, draw: int) -> Sides:
    """All that an estimator may use, of one draw."""
    assert model.masters is not None
    wide = copy.deepcopy(model.model).float()
    clean, logits = losses(model, model.model)
    wide_clean, _ = losses(model, wide)

    def probe(distance: float, sign: float) -> Tuple[Tensor, Tensor]:
        model.sam(0.0, distance).probe(model.params, SEED, draw, sign)
        return losses(model, model.model)

    ahead, moved_logits = probe(radius, 1.0)
    wide.load_state_dict(model.model.state_dict())
    wide_ahead, _ = losses(model, wide)
    for p, master in model.masters.items():
        p.data.neg_().add_(master.to(p.dtype), alpha=2)
    reflected, _ = losses(model, model.model)
    behind, _ = probe(radius, -1.0)
    near, _ = probe(radius / 2, -1.0)
    for p, master in model.masters.items():
        p.data.copy_(master)
    target = F.one_hot(model.sample["target"].view(-1), logits.size(1))
    linear = clean + ((logits.softmax(dim=1) - target) * (moved_logits - logits)).sum(dim=1)
    return Sides(clean, ahead, behind, near, reflected, linear, wide_clean, wide_ahead)


def main() -> None:
    parser = options("probe_estimators", __doc__ or "")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 0.2, 0.35])
    args = parser.parse_args()
    if args.draws < 2:
        parser.error(f"--draws {args.draws}: the curvature of other draws needs at least 2")
    pairs = load(args)
    found: Dict[Tuple[str, str, float], List[float]] = {}
    for name in PRECISIONS:
        for exact, model in pairs[name]:
            unit = unit_roundoff(model.dtype) ** (1 / 3) * float(
                global_norm(p.data for p in model.params)
            )
            for factor in args.factors:
                draws = [sides(model, factor * unit, draw) for draw in range(args.draws)]
                for draw, own in enumerate(draws):
                    others = draws[:draw] + draws[draw + 1 :]
                    exact_a = exact.exact_guardedness(0.05, draw)
                    for kind, estimate in ESTIMATORS.items():
                        distance = total_variation(estimate(own, others), exact_a)
                        found.setdefault((name, kind, factor), []).append(distance)
    rows = []
    for name, kind in itertools.product(PRECISIONS, ESTIMATORS):
        cells = [found[name, kind, factor] for factor in args.factors]
        rows.append([name, kind, *(f"{sum(c) / len(c):.3f} ({max(c):.3f})" for c in cells)])
    text = markdown_table(["", "estimator", *(f"{f:g}" for f in args.factors)], rows) + "\n"
    Path(f"{args.out}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
