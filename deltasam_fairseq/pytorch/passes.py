"""A plain PyTorch loop's side of an ascent: its closures, loss scale and processes."""

import contextlib
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from deltasam_fairseq.algorithms import (
    TRUST_REGION,
    Reweighting,
    trust_region_sums,
    update_generator,
)
from deltasam_fairseq.core import Parts, Passes, RngReplay

# Computes the losses of the sentences of a micro-batch, shape (B,); or these and the outputs.
Closure = Callable[[], Any]

_BUCKET = 1 << 23  # gradients that one all-reduce averages


class Outcome(NamedTuple):
    """What a closure returned: losses, shape (B,), and the outputs z that they are made of."""

    losses: Tensor
    outputs: Optional[Tensor] = None


class Generators:
    """torch's random generators of the processor and of some devices, as they are now.

    Calling the object puts them back.

    Args:
        devices: those of the weights.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda: Dict[torch.device, Tensor] = {
            d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"
        }

    def __call__(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class ClosurePasses(Passes[Outcome]):
    """The passes over one update's micro-batches, one closure each.

    Args:
        closures: of this process, at least one.
        model: in its data-parallel wrapper, if there is one.
        params: all weights that train.
        group: the processes, None for one.
        scale_loss: what ``GradScaler.scale`` does.
        parts: the method.
        draw: seed and update, which the random numbers of an update depend on.
        divisor: of the losses' sum in the ascent, the same on every process.

    Attributes:
        clean: losses at w without graph, one tensor a micro-batch.
        n: sentences of the global batch, see `count_sentences`.
        world: number of processes.
        deltas: ``dL/dz`` at w of every micro-batch, L the sum of its losses.
    """

    per_sentence = True

    def __init__(
        self,
        closures: Sequence[Closure],
        model: Module,
        params: Sequence[Parameter],
        group: Any,
        scale_loss: Callable[[Tensor], Tensor],
        parts: Parts,
        draw: Tuple[int, int],
        divisor: float = 1.0,
    ) -> None:
        self.count = len(closures)
        self.clean: Dict[int, Tensor] = {}
        self.deltas: Dict[int, Tensor] = {}
        self._logits: Dict[int, Tensor] = {}
        self._along_outputs = parts.descent.along_outputs
        self._needs_outputs = self._along_outputs or parts.radius.needs_outputs
        self._draw = draw
        self._closures, self._params, self._group = closures, params, group
        self._model: Any = model
        self._scale_loss, self._divisor = scale_loss, divisor
        self.world = 1 if group is None else dist.get_world_size(group)
        one = torch.ones((), device=params[0].device)
        self.scale: Union[float, Tensor] = scale_loss(one) / (divisor * self.world)
        devices = list(dict.fromkeys(p.device for p in params))
        self._replay = RngReplay(Generators(devices), host=True, buffers=list(model.buffers()))

    def replay(self) -> None:
        torch.clear_autocast_cache()  # a surrounding autocast has casts of other weights
        self._replay()

    def forward(self, i: int, kept: Optional[Tensor] = None) -> Outcome:
        found = checked(self._closures[i](), self._needs_outputs)
        losses, z = found
        if self._along_outputs and z is not None and torch.is_grad_enabled():
            if i not in self.deltas:  # the first forward with graph is at w
                (self.deltas[i],) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
        return found

    def losses(self, forward: Outcome) -> Tensor:
        return forward.losses

    def log(self, i: int, forward: Outcome) -> None:
        self.clean[i] = forward.losses.detach()
        if forward.outputs is not None:
            self._logits[i] = forward.outputs.detach()

    @torch.no_grad()
    def divergence(self, i: int, sigma: Optional[float] = None) -> Tensor:
        """See `Passes`; all outputs count, of one column as numbers."""
        if sigma is None:
            return self._divergence_of(i, self.forward(i).outputs)
        if i == 0:
            rank = 0 if self._group is None else dist.get_rank(self._group)
            own = update_generator(*self._draw, TRUST_REGION, torch.device("cpu"), rank)
            torch.manual_seed(own.initial_seed())
        hook = _embeddings(self._model).register_forward_hook(
            lambda module, inputs, output: output + sigma * torch.randn_like(output)
        )
        try:
            return self._divergence_of(i, self.forward(i).outputs)
        finally:
            hook.remove()

    def _divergence_of(self, i: int, outputs: Optional[Tensor]) -> Tensor:
        assert outputs is not None
        return trust_region_sums(outputs, self._logits[i], regression=outputs.size(-1) == 1)

    def backward(self, loss: Tensor, factor: Union[None, float, Tensor] = None) -> None:
        """Accumulate the gradient of ``factor loss``, times the loss scale.

        Args:
            factor: default: the ascent's.
        """
        torch.clear_autocast_cache()  # checkpointing computes forwards again, after the probe
        self._scale_loss(loss * (1 / self._divisor if factor is None else factor)).backward()

    def count_sentences(self, reweighting: Optional[Reweighting] = None) -> None:
        """Count the sentences of all processes, once their losses at w are known.

        Args:
            reweighting: of the ascent, which has counted them.
        """
        own = sum(len(losses) for losses in self.clean.values())
        counted = self._group is not None and reweighting is not None
        self.n = reweighting.n if counted and reweighting else self.sum_over_processes(own)

    def require_same_count(self) -> None:
        """Compare the number of micro-batches; waits for the device.

        Raises:
            ValueError: it is not the same on every process; on every process.
        """
        most = torch.tensor([self.count, -self.count], device=self._params[0].device)
        self.reduce(most, op="max")
        if most[0] != -most[1]:
            raise ValueError(
                f"SharpnessAware: {self.count} micro-batches here, on other processes {-most[1]} "
                f"to {most[0]}; pass the same number on every process, of any sizes"
            )

    def sum_over_processes(self, n: int) -> Union[int, Tensor]:
        """Return ``n`` added up over all processes: 0-dim float64 on the device if several."""
        if self._group is None:
            return n
        total = torch.full((), n, dtype=torch.float64, device=self._params[0].device)
        self.reduce(total)
        return total

    def backward_batch_loss(self, i: int) -> None:
        found = self.forward(i)
        self.backward(found.losses.sum())
        self.log(i, found)

    def no_sync_unless_last(self, last: bool) -> ContextManager[Any]:
        """Reduce nothing here: `average_grads` does, whatever the wrapper waits for."""
        return self.without_sync(True)

    def without_sync(self, wanted: bool) -> ContextManager[Any]:
        """Return a context without reduction by the model's wrapper, if ``wanted``."""
        if wanted and hasattr(self._model, "no_sync"):
            return self._model.no_sync()
        return contextlib.nullcontext()

    def reduce(self, figures: Tensor, op: str = "sum") -> None:
        if self._group is not None:
            dist.all_reduce(
                figures, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], self._group
            )

    def average_grads(self) -> None:
        """Average the gradients, where one process has none it counts as zero."""
        if self._group is None:
            return
        for params in _buckets(self._params):
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                elif p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
            grads = [p.grad for p in params if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads]) / self.world
            dist.all_reduce(flat, group=self._group)
            for g, averaged in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(averaged.view_as(g))


def _buckets(params: Sequence[Parameter]) -> List[List[Parameter]]:
    """Cut ``params`` into lists of one dtype and device and about `_BUCKET` elements."""
    buckets: List[List[Parameter]] = []
    filled, kind = 0, None
    for p in params:
        if (p.dtype, p.device) != kind or filled >= _BUCKET:
            buckets.append([])
            filled, kind = 0, (p.dtype, p.device)
        buckets[-1].append(p)
        filled += p.numel()
    return buckets


def _embeddings(model: Module) -> Module:
    """Return the module of the word embeddings: a Hugging Face model's own, or the first there is.

    Raises:
        ValueError: there is none.
    """
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_input_embeddings"):
        return inner.get_input_embeddings()
    for module in inner.modules():
        if isinstance(module, torch.nn.Embedding):
            return module
    raise ValueError("SharpnessAware: TRAM puts noise on word embeddings, and the model has none")


def checked(found: Any, needs_outputs: bool) -> Outcome:
    """Return what a closure returned.

    Raises:
        ValueError: the losses are not one a sentence in float32 or better, or there are no outputs
            where they are needed.
    """
    losses, outputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if needs_outputs and not torch.is_tensor(outputs):
        raise ValueError(
            "the closure returned no outputs, which functional SAM and TRAM need beside the "
            "losses; return the logits that they are computed from: logits = logits.float(); "
            'return F.cross_entropy(logits, labels, reduction="none"), logits'
        )
    if not torch.is_tensor(losses) or losses.dim() != 1:
        found = f"of shape {tuple(losses.shape)}" if torch.is_tensor(losses) else type(losses)
        raise ValueError(
            f"the closure returned losses {found}; return one loss a sentence, shape (B,): "
            'F.cross_entropy(logits.float(), labels, reduction="none"), and of the tokens of a '
            "sentence the sum"
        )
    if losses.element_size() < 4:
        raise ValueError(
            f"the closure returned losses in {losses.dtype}, too coarse for their differences; "
            "compute them in float32, from logits.float()"
        )
    return Outcome(losses, outputs)
