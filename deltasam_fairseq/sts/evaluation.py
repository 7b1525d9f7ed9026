"""Spearman's correlation of cosines and scores on sets of semantic textual similarity."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from torch import Tensor

from deltasam_fairseq.checkpoints import (
    CheckpointDamagedError,
    CheckpointRefusedError,
    DataMismatchError,
    DataRecord,
    fit_to_data,
)
from deltasam_fairseq.criterions.glue_metrics import spearman
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.sts.embeddings import pool
from deltasam_fairseq.sts.folder import TASK, Pair
from deltasam_fairseq.sts.task import (
    EVALUATION_LENGTH,
    SentenceEmbeddingConfig,
    SentenceEmbeddingTask,
)


class SentenceModel(NamedTuple):
    """A model, the task that makes tokens for it, and how it is asked.

    Attributes:
        model: of fairseq, in evaluation mode.
        task: with the dictionary and the BPE.
        pooling: see `pool`.
        max_length: tokens of a sentence at most.
        batch_size: sentences at a time.
    """

    model: Any
    task: SentenceEmbeddingTask
    pooling: str
    max_length: int = EVALUATION_LENGTH
    batch_size: int = 128

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return their embeddings, shape (N, C), float64, on the CPU."""
        once = list(dict.fromkeys(sentences))
        rows = [self.task.encoder.encode(text, self.max_length) for text in once]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        pad, device = self.task.dictionary.pad(), next(self.model.parameters()).device
        pad_to = self.max_length if self.pooling == "mean_padded" else None
        found: Dict[str, Tensor] = {}
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            tokens = data_utils.collate_tokens([rows[i] for i in batch], pad, pad_to_length=pad_to)
            tokens = tokens.to(device)
            features = self.model(tokens, features_only=True)[0]
            vectors = pool(features, tokens.ne(pad), self.pooling).double().cpu()
            found.update(zip((once[i] for i in batch), vectors))
        return torch.stack([found[text] for text in sentences])

    def score(self, pairs: Sequence[Pair]) -> float:
        """Return Spearman's correlation of cosines and scores, times 100."""
        scores, first, second = zip(*pairs)
        cosines = torch.cosine_similarity(self.embed(first), self.embed(second))
        return 100 * spearman(cosines.tolist(), scores)


def load_model(path: Path, data: Path, pooling: Optional[str] = None) -> SentenceModel:
    """Load a checkpoint of RoBERTa or BERT: one of ``--task sentence_embedding``, or any other.

    Args:
        path: of the checkpoint.
        data: prepared folder, for its dict.txt and BPE.
        pooling: default: as in training.

    Raises:
        DataError: a file is missing or damaged, or does not go with the folder, or the pooling is
            not known.
    """
    name = f"--path {path}"
    if not path.is_file():
        raise DataError(f"{name}: no such file")
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        fit_to_data(state, DataRecord.of_folder(data), name)
        model_cfg, trained = state["cfg"]["model"], state["cfg"]["task"]
    except DataMismatchError as error:
        raise DataError(str(error)) from error
    except (CheckpointDamagedError, CheckpointRefusedError) as error:
        raise DataError(f"--path: {error}") from error  # names the file itself
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{name}: no checkpoint of fairseq ({error})") from error
    if getattr(trained, "_name", None) == TASK:
        pooling = pooling or str(trained.pooling)
    if pooling is None:
        raise DataError(f"{name}: not of --task {TASK}; say how it embeds, with --pooling")
    positions = getattr(model_cfg, "max_positions", None) or 512
    cfg = SentenceEmbeddingConfig(data=str(data), pooling=pooling, max_positions=positions)
    task = SentenceEmbeddingTask.setup_task(cfg)
    try:
        model = task.build_model(model_cfg)
        model.load_state_dict(state["model"], strict=True, model_cfg=model_cfg)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{name}: {error}") from error
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    return SentenceModel(model, task, pooling)


def mean_of(scores: Dict[str, float], wanted: Sequence[str]) -> str:
    """Return the average in words: of which sets it is, and which are missing."""
    missing = [name for name in wanted if name not in scores]
    mean = sum(scores.values()) / len(scores)
    without = f" (missing: {', '.join(missing)})" if missing else ""
    return f"average of {len(scores)} sets: {mean:.2f}{without}"


def as_rows(scores: Dict[str, float]) -> List[List[str]]:
    """Return the rows of a table."""
    return [[name, f"{score:.2f}"] for name, score in scores.items()]
