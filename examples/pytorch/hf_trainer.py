"""The Hugging Face Trainer with sharpness-aware updates: a subclass of ten lines."""

from typing import Any, Dict

import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from deltasam_fairseq.pytorch import SharpnessAware


class SharpnessAwareTrainer(Trainer):
    """Trainer whose gradients are taken at ``w + eps*``; of a sequence classification model.

    With gradient_accumulation_steps every micro-batch has a perturbation of its own (m-sharpness).
    Checkpoints are the Trainer's, without `SharpnessAware.state_dict`: a resumed run draws the
    probes and the rounding of the first updates again, and computes the mask of ``fsam`` at once.
    """

    method: Dict[str, Any] = {"method": "delta_sam", "rho": 0.05, "beta": 3.0}
    sam = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        self.sam = self.sam or SharpnessAware(model, **self.method)
        inputs = self._prepare_inputs(inputs)

        def losses() -> Tensor:
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            return F.cross_entropy(logits.float(), inputs["labels"], reduction="none")

        scale = 1 / self.args.gradient_accumulation_steps
        return self.sam.backward(losses, self.accelerator.scaler, scale).mean() * scale
