"""A trained model whose outputs another one learns to give: reading, checking, running it."""

from collections import deque
from typing import Any, Deque, Dict, Mapping, Optional, Tuple

import torch
from fairseq import checkpoint_utils, models
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor, nn

from deltasam_fairseq.checkpoints import DataRecord, fit_to_data
from deltasam_fairseq.criterions.batch import Batch

_HEADS, _EMBEDDINGS = "classification_heads.", "embed_tokens.weight"


class Teacher:
    """Gives the scores (see `objectives`) of a trained model, in eval mode, without graph.

    It is no `nn.Module`, so that a criterion that holds one has no parameters by it: nothing of the
    teacher is trained, saved, averaged or wrapped for data parallelism.

    Args:
        model: of any architecture; it follows the student to its device and precision.
        head: name of its classification head; None for a model with no choice of one.
        keep: of how many micro-batches the scores are kept for the further forwards of an
            update, which SAM makes; None: of all.
    """

    def __init__(self, model: nn.Module, head: Optional[str], keep: Optional[int]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = head
        self.keep = keep
        self._known: Deque[Tuple[Tensor, Tensor]] = deque(maxlen=0)

    def begin_update(self) -> None:
        """What is kept is of the last update: forget it, and keep what comes."""
        self._known = deque(maxlen=self.keep)

    def end_update(self) -> None:
        """Nothing is kept between updates."""
        self._known = deque(maxlen=0)

    def scores(self, batch: Batch) -> Tensor:
        """The teacher's scores of the student's batch.

        Raises:
            ValueError: for a sentence that is longer than the teacher can read.
        """
        for tokens, scores in self._known:
            if tokens is batch.tokens:
                return scores
        student = next(batch.model.parameters())
        self.model.to(device=batch.tokens.device, dtype=student.dtype)
        inputs: Dict[str, Any] = dict(batch.inputs)
        if self.head is not None:
            inputs["classification_head_name"] = self.head
        self._check_lengths(inputs)
        with torch.no_grad():
            scores = batch.objective.scores(self.model(**inputs)[0])
        self._known.append((batch.tokens, scores))
        return scores

    def _check_lengths(self, inputs: Mapping[str, Any]) -> None:
        longest: Any = self.model.max_positions()  # type: ignore[operator]
        limits = longest if isinstance(longest, tuple) else (longest,)
        for key, limit in zip(("src_tokens", "prev_output_tokens"), limits):
            if limit is not None and key in inputs and inputs[key].size(1) > limit:
                raise ValueError(
                    f"--distill-teacher: a sentence of {inputs[key].size(1)} tokens is longer than "
                    f"the {limit} positions of the teacher; cut or drop longer ones, with "
                    "--max-positions (--max-source-positions, --max-target-positions)"
                )


def load_teacher(path: str, task: Any, head: Optional[str]) -> nn.Module:
    """A model of whatever architecture, from a checkpoint of fairseq's.

    torch's random generator is left where it was, so that a run's own draws are the same
    whatever the teacher.

    Args:
        path: of the checkpoint; read through this package's safe reader.
        task: the student's, whose dictionaries and classes are the teacher's too.
        head: name of the classification head; None: the model needs none.

    Raises:
        ValueError: if the checkpoint is of another dictionary, has no such head, or has one with
            another number of classes, or a decoder that the task has no input for; or if it was
            trained on data of another kind than the task's (`fit_to_data`).
    """
    state, model_cfg = _read(path)
    weights = state["model"]
    _check_dictionary(path, task, weights)
    sizes = None if head is None else _head_sizes(path, task, head, weights)
    fit_to_data(state, DataRecord.of_task(task), f"--distill-teacher {path}", head)
    with torch.random.fork_rng(devices=[]):
        model = models.build_model(model_cfg, task)
        if sizes is not None:
            model.register_classification_head(head, *sizes)
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
        raise ValueError(
            f"--distill-teacher {path}: a teacher with --adaptive-softmax-cutoff has no logits of "
            "the whole vocabulary; take one without"
        )
    if hasattr(model, "decoder") and getattr(task.cfg, "add_prev_output_tokens", True) is False:
        raise ValueError(
            f"--distill-teacher {path}: the teacher has a decoder, which needs an input of its "
            "own; give --add-prev-output-tokens, which a student without decoder does not mind"
        )
    model.load_state_dict(weights, strict=True, model_cfg=model_cfg)
    return model


def _read(path: str) -> Tuple[Dict[str, Any], Any]:
    """What is in a checkpoint, and the configuration of its model."""
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        cfg = state["cfg"] if state.get("args") is None else None
        cfg = cfg or convert_namespace_to_omegaconf(state["args"])
        return state, cfg.model
    except KeyError as error:  # of fairseq's, which brings old files up to date
        raise ValueError(
            f"--distill-teacher {path}: it has no {error}; give a checkpoint that fairseq-train "
            "has written, or python -m deltasam_fairseq.convert and then fairseq-train"
        ) from error


def _check_dictionary(path: str, task: Any, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not name.endswith(_EMBEDDINGS):
            continue
        in_decoder = name.startswith("decoder.")
        known = len(task.target_dictionary if in_decoder else task.source_dictionary)
        if len(weight) != known:
            raise ValueError(
                f"--distill-teacher {path}: its {name} has {len(weight)} words, the data's "
                f"dictionary {known}; teacher and student need the same dictionary, so fine-tune "
                "the teacher on this data, encoded with the student's dict.txt"
            )


def _head_sizes(path: str, task: Any, head: str, weights: Mapping[str, Tensor]) -> Tuple[int, int]:
    """Number of classes and inner dimension of a head of the checkpoint."""
    heads = sorted({n.split(".")[1] for n in weights if n.startswith(_HEADS)})
    if head not in heads:
        raise ValueError(
            f"--distill-teacher {path}: it has no classification head {head} (it has "
            f"{', '.join(heads) or 'none'}); name one with --distill-teacher-head, or fine-tune "
            "the teacher on this task first"
        )
    output = f"{_HEADS}{head}.out_proj.weight"
    classes = len(weights[output if output in weights else output + "_orig"])
    if classes != task.cfg.num_classes:
        raise ValueError(
            f"--distill-teacher {path}: its head {head} has {classes} outputs, --num-classes is "
            f"{task.cfg.num_classes}; teacher and student need the same classes"
        )
    return classes, len(weights[f"{_HEADS}{head}.dense.weight"])
