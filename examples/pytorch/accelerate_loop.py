"""A loop of Accelerate's with sharpness-aware updates; start it with ``accelerate launch``."""

from typing import Any, Dict, Iterable

import torch.nn.functional as F
from accelerate import Accelerator

from deltasam_fairseq.pytorch import SharpnessAware


def train(model: Any, optimizer: Any, scheduler: Any, loader: Iterable[Any]) -> Dict[str, float]:
    """Train for an epoch.

    Args:
        model: with ``logits`` in what it returns.
        loader: of mini-batches, dictionaries with ``labels``.

    Returns:
        the figures of the last update.
    """
    accelerator = Accelerator()
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    sam = SharpnessAware(model, method="delta_sam", rho=0.05, beta=3.0)
    for batch in loader:
        labels = batch.pop("labels")
        sam.backward(
            lambda: F.cross_entropy(model(**batch).logits.float(), labels, reduction="none"),  # noqa
            scaler=accelerator.scaler,
        )
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return sam.figures()
