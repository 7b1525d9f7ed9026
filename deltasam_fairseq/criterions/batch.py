"""A mini-batch and a model, for the regularisers: forward again, with something perturbed."""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from deltasam_fairseq.algorithms import normalised
from deltasam_fairseq.criterions.embeddings import WordEmbeddings, unwrapped
from deltasam_fairseq.criterions.task_losses import Objective

try:
    from torch.func import functional_call
except ImportError:  # torch 1.13
    from torch.nn.utils.stateless import functional_call  # type: ignore[assignment]


class Batch:
    """Forwards of one model on one mini-batch.

    Args:
        model: in whatever data-parallel wrapper.
        sample: fairseq's mini-batch; it is not changed.
        objective: the task's.
        model_kwargs: what the model's forward takes beside ``net_input``.
        loss_scale: what losses are multiplied by in backward passes of the criterion's own, so
            that gradients in half precision neither vanish nor overflow.

    Attributes:
        tokens: src_tokens, shape (B, T).
        mask: True where there is a token, all but padding, shape (B, T).
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Dict[str, Any],
        objective: Objective,
        model_kwargs: Mapping[str, Any],
        loss_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.objective = objective
        self.loss_scale = loss_scale
        self.inputs = {**sample["net_input"], **model_kwargs}
        self.tokens: Tensor = self.inputs["src_tokens"]
        self._embeddings: Optional[WordEmbeddings] = None

    @property
    def embeddings(self) -> WordEmbeddings:
        if self._embeddings is None:
            self._embeddings = WordEmbeddings(self.model)
        return self._embeddings

    @property
    def mask(self) -> Tensor:
        return self.tokens.ne(self.embeddings.padding_idx)

    # Forwards

    def scores(self, delta: Optional[Tensor] = None) -> Tensor:
        """Scores (see `objectives`) of a forward whose graph the update's backward will use.

        Args:
            delta: perturbation of the word embeddings, shape (B, T, C).
        """
        return self._scores(self.model, delta)

    def inner_scores(self, delta: Tensor) -> Tensor:
        """The same for a forward whose graph the criterion uses itself.

        It goes past the data-parallel wrapper, which would wait for a backward of its own and
        reduce what is to stay here.
        """
        return self._scores(unwrapped(self.model), delta)

    def _scores(self, model: nn.Module, delta: Optional[Tensor]) -> Tensor:
        if delta is None:
            return self.objective.scores(model(**self.inputs)[0])
        with self.embeddings.perturbed(self.tokens, delta):
            return self.objective.scores(model(**self.inputs)[0])

    @torch.no_grad()
    def scores_with(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Scores of the same model with other weights, without graph.

        Args:
            weights: by the names of the model's parameters.
        """
        model = unwrapped(self.model)
        # What a forward writes to (spectral norm) is not to change by it.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = functional_call(model, {**buffers, **weights}, (), self.inputs)
        return self.objective.scores(output[0])

    # Perturbations

    def zeros(self) -> Tensor:
        """No perturbation; shape (B, T, C), at least float32."""
        embedded = self.embeddings.of(self.tokens)
        dtype = torch.promote_types(embedded.dtype, torch.float32)
        return torch.zeros_like(embedded, dtype=dtype)

    def noise(self, kind: str, size: float) -> Tensor:
        """Random perturbation, zero at padding.

        Args:
            kind: ``uniform`` in [-size, size], or ``normal`` with standard deviation size.
            size: in units of an embedding's entries.

        Returns:
            shape (B, T, C), at least float32.
        """
        delta = self.zeros()
        if kind == "uniform":
            delta.uniform_(-size, size)
        else:
            delta.normal_(std=size)
        return delta * self.mask.unsqueeze(-1)

    # Backward passes of the criterion's own

    def gradient(
        self, losses: Tensor, delta: Tensor, others: Sequence[Tensor] = (), keep_graph: bool = False
    ) -> Tuple[Tensor, ...]:
        """Gradients of the sum of losses, times the loss scale.

        Args:
            losses: shape (B,).
            delta: a perturbation that they depend on.
            others: further tensors to take the gradient for; None where one has no part.
            keep_graph: whether another backward through the same graph will come.

        Returns:
            gradient with respect to ``delta``, zero at padding; then those of ``others``.
        """
        total = losses.sum() * self.loss_scale
        inputs = [delta, *others]
        own, *rest = torch.autograd.grad(
            total, inputs, retain_graph=keep_graph, allow_unused=bool(others)
        )
        return (own * self.mask.unsqueeze(-1), *rest)

    def direction(self, losses: Tensor, delta: Tensor, norm: float) -> Tensor:
        """Steepest ascent of every sentence's own loss.

        Args:
            losses: shape (B,).
            delta: a perturbation that they depend on.
            norm: 2 or ``math.inf``.

        Returns:
            shape (B, T, C), each sentence's block of norm 1, or 0 where the gradient is.
        """
        return normalised(self.gradient(losses, delta)[0], norm)


class SameMasks:
    """Puts torch's random generators back to where they are now.

    Calling the object before each of several forwards gives them the same dropout masks.

    Args:
        device: of the model.
        wanted: False makes the object do nothing: every forward draws masks of its own.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self._device = device
        self._wanted = wanted
        if wanted:
            self._host = torch.get_rng_state()
            if device.type == "cuda":
                self._cuda = torch.cuda.get_rng_state(device)

    def __call__(self) -> None:
        if self._wanted:
            torch.set_rng_state(self._host)
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._cuda, self._device)
