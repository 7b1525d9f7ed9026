"""Sentence embeddings from plain sentences, as a task of fairseq.

The data is what ``python -m deltasam_fairseq.sts.prepare`` writes: sentences to train on, and pairs
with scores to validate with.
"""

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from fairseq import models
from fairseq.data import Dictionary, FairseqDataset, data_utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.roberta import RobertaModel
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, OmegaConf, open_dict
from torch import Tensor

from deltasam_fairseq.options import check_options, option, require
from deltasam_fairseq.sts.embeddings import POOLINGS, embed_padding
from deltasam_fairseq.sts.folder import PREPARE, read_bpe, read_pairs, read_sentences
from deltasam_fairseq.sts.views import LITERAL, MASK, SentenceEncoder, split_at_span

logger = logging.getLogger(__name__)

POOLING = ChoiceEnum(list(POOLINGS))
EVALUATION_LENGTH = 64  # tokens of a sentence whose similarity is measured, as in Mirror-BERT


@dataclass
class SentenceEmbeddingConfig(FairseqDataclass):
    """Where the sentences are, and what an embedding is made of."""

    data: str = field(default=MISSING, metadata={"help": f"folder written by {PREPARE}"})
    pooling: POOLING = field(  # type: ignore[valid-type]
        default="cls",
        metadata={
            "help": "what a sentence's embedding is: cls (features of <s>), mean (over its tokens) "
            "or mean_padded (over all positions of the batch, padded to --max-length); "
            "Mirror-BERT: RoBERTa cls, BERT mean_padded (default: cls)"
        },
    )
    max_length: int = option(50, "tokens of a sentence, <s> and </s> included", at_least=3)
    span_mask: int = option(
        5, "characters that are masked in the second view of a sentence; 0: none", at_least=0
    )
    literal_mask: bool = field(
        default=False,
        metadata={
            "help": "put the text [MASK] where the span was, as Mirror-BERT's code does for every "
            "model, RoBERTa too. Default: the model's own mask token (the same for BERT)"
        },
    )
    max_positions: int = option(512, "tokens that the model has positions for", at_least=3)
    seed: int = II("common.seed")


class _Pairs(FairseqDataset):
    """Two sequences of tokens an item; a batch has all first ones, then all second ones.

    Args:
        dictionary: its padding.
        pad_to: least length of a batch's sequences.
        longest: most tokens of a sequence.
    """

    def __init__(self, dictionary: Dictionary, longest: int, pad_to: int) -> None:
        self._pad = dictionary.pad()
        self._longest = longest
        self._pad_to = pad_to

    def collater(self, samples: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
        """Merge items to a mini-batch, ``src_tokens`` of shape (2B, T)."""
        if not samples:
            return {}
        sequences = [s[view] for view in ("first", "second") for s in samples]
        batch = {
            "id": torch.tensor([s["id"] for s in samples]),
            "net_input": {
                "src_tokens": data_utils.collate_tokens(
                    sequences, self._pad, pad_to_length=self._pad_to or None
                ),
                "src_lengths": torch.tensor([len(x) for x in sequences]),
            },
            "nsentences": len(samples),
            "ntokens": sum(len(x) for x in sequences),
        }
        if "target" in samples[0]:
            batch["gold"] = [s["target"] for s in samples]  # half precision would make ties
            batch["target"] = torch.tensor(batch["gold"])
        return batch

    def num_tokens(self, index: int) -> int:
        """Return the most tokens that an item can have."""
        return 2 * self._longest

    def size(self, index: int) -> int:
        """Return the most tokens that one of its sequences can have."""
        return self._longest


class Views(_Pairs):
    """Both views of each sentence, the same for a seed, epoch and sentence.

    Args:
        sentences: plain text.
        encoder: makes their tokens.
        cfg: the task's.
        dictionary, pad_to: see `_Pairs`.

    Attributes:
        ranks: batches that are made into one, and dropped if not complete.
    """

    def __init__(
        self,
        sentences: List[str],
        encoder: SentenceEncoder,
        cfg: Any,
        dictionary: Dictionary,
        pad_to: int,
    ) -> None:
        super().__init__(dictionary, cfg.max_length, pad_to)
        self._sentences = sentences
        self._encoder = encoder
        self._cfg = cfg
        self._epoch = 1
        self.ranks = 1

    def __len__(self) -> int:
        return len(self._sentences)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        first, second = self.views(int(index))
        return {"id": int(index), "first": first, "second": second}

    def views(self, index: int) -> Tuple[Tensor, Tensor]:
        """Tokens of the sentence, and of the sentence with a span masked."""
        cfg, text = self._cfg, self._sentences[index]
        generator = np.random.default_rng([abs(cfg.seed), self._epoch, index])
        first = self._encoder.encode(text, cfg.max_length)
        parts = split_at_span(text, cfg.span_mask, generator)
        if parts is None:
            return first, first
        if cfg.literal_mask:
            return first, self._encoder.encode(f" {LITERAL} ".join(parts), cfg.max_length)
        return first, self._encoder.encode_masked(*parts, cfg.max_length)

    def set_epoch(self, epoch: int) -> None:
        """Give the sentences other spans."""
        self._epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False: each epoch has batches and views of its own."""
        return False

    def ordered_indices(self) -> np.ndarray:
        """Return the sentences in random order, the same for a seed and epoch."""
        # fairseq 0.12.2 seeds numpy for all epochs alike. With the length, which is no sentence's
        # number, the draws differ from those of the spans.
        entropy = [abs(self._cfg.seed), self._epoch, len(self)]
        return np.random.default_rng(entropy).permutation(len(self))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: Any = None,
        max_sentences: Any = None,
        required_batch_size_multiple: int = 1,
    ) -> List[np.ndarray]:
        """Return batches of ``max_sentences`` each, as many as are a multiple of ``ranks``.

        Raises:
            UsageError: there is not one for every rank, or a sentence would have no negatives.
        """
        why = "the number of negatives would change; give --batch-size alone"
        require(max_tokens is None, "max-tokens", max_tokens, why)
        count = max_sentences or 0
        why = "NT-Xent needs other sentences as negatives; give at least 2"
        require(count * self.ranks > 1, "batch-size", max_sentences, why)
        batches = len(indices) // (count * self.ranks) * self.ranks
        why = f"of each of {self.ranks} ranks, there are {len(indices)} sentences, and a batch "
        why += "that is not full is dropped; give a smaller one"
        require(batches > 0, "batch-size", max_sentences, why)
        return [indices[i * count : (i + 1) * count] for i in range(batches)]


class ScoredPairs(_Pairs):
    """Pairs of sentences with a score from 0 to 1."""

    def __init__(
        self,
        pairs: Sequence[Tuple[Tensor, Tensor]],
        scores: Sequence[float],
        dictionary: Dictionary,
        pad_to: int,
    ) -> None:
        super().__init__(dictionary, EVALUATION_LENGTH, pad_to)
        self._pairs = pairs
        self._scores = scores

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        first, second = self._pairs[index]
        return {"id": int(index), "first": first, "second": second, "target": self._scores[index]}


@register_task("sentence_embedding", dataclass=SentenceEmbeddingConfig)
class SentenceEmbeddingTask(FairseqTask):
    """Two views of plain sentences in training, scored pairs of sentences in validation.

    Attributes:
        encoder: makes tokens of text.
    """

    def __init__(self, cfg: Any, dictionary: Dictionary, encoder: SentenceEncoder) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary
        self.encoder = encoder

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        """Read a dict.txt and add <mask>, as fairseq's masked_lm does."""
        dictionary = Dictionary.load(filename)
        dictionary.add_symbol(MASK)
        return dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "SentenceEmbeddingTask":
        """Read the dictionary and the BPE.

        Raises:
            ValueError: an option is out of range, or the folder is not one of prepared data.
        """
        check_options(cfg, SentenceEmbeddingConfig)
        for name, length in (("max-length", cfg.max_length), ("", EVALUATION_LENGTH)):
            require(
                length <= cfg.max_positions,
                name or "max-positions",
                length if name else cfg.max_positions,
                f"sentences have up to {length} tokens, the model {cfg.max_positions} positions "
                "(--max-positions); take fewer tokens, or a model of more positions",
            )
        data = Path(cfg.data)
        bpe = read_bpe(data)
        dictionary = cls.load_dictionary(str(data / "dict.txt"))
        return cls(cfg, dictionary, SentenceEncoder(bpe.encode, dictionary))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split: train has sentences, all others have scored pairs.

        Raises:
            FileNotFoundError: there is no such split.
        """
        data, padded = Path(self.cfg.data), self.cfg.pooling == "mean_padded"
        if split == "train":
            sentences = read_sentences(data)
            pad_to = self.cfg.max_length if padded else 0
            dataset: _Pairs = Views(sentences, self.encoder, self.cfg, self.dictionary, pad_to)
            self._say_duplicates(sentences)
        else:
            rows = read_pairs(data, split)
            pairs = [tuple(self.encoder.encode(t, EVALUATION_LENGTH) for t in r[1:]) for r in rows]
            top = max(row[0] for row in rows) or 1.0
            scores = [row[0] / top for row in rows]
            pad_to = EVALUATION_LENGTH if padded else 0
            dataset = ScoredPairs(pairs, scores, self.dictionary, pad_to)  # type: ignore[arg-type]
            logger.info(f"{split}: {len(rows)} pairs of sentences")
        self.datasets[split] = dataset
        return dataset

    @staticmethod
    def _say_duplicates(sentences: List[str]) -> None:
        again = len(sentences) - len(set(sentences))
        logger.info(f"train: {len(sentences)} sentences")
        if again:
            logger.warning(
                f"train: {again} of {len(sentences)} sentences repeat an earlier one; two such in "
                f"a batch are each other's negatives, as in Mirror-BERT. {PREPARE} "
                "--drop-duplicates keeps each once"
            )

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model.

        Raises:
            ValueError: it is no encoder of sentences.
        """
        with open_dict(cfg) if OmegaConf.is_config(cfg) else contextlib.nullcontext():
            cfg.max_positions = self.cfg.max_positions
        model = models.build_model(cfg, self, from_checkpoint)
        if not isinstance(model, RobertaModel):
            raise ValueError(
                f"--arch of {type(model).__name__}: embeddings of sentences need an encoder; use "
                "--arch roberta_base or roberta_large (XLM-R is one too), or bert"
            )
        if self.cfg.pooling == "mean_padded":
            embed_padding(model)
        return model

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's; the batches of all ranks in an update are neighbours in the epoch's order.

        So R ranks with B sentences each train on the batches of one rank with R B.
        """
        kwargs["required_batch_size_multiple"] = 1
        if isinstance(dataset, Views):
            dataset.ranks = kwargs.get("num_shards", 1)
            kwargs["grouped_shuffling"] = True
        return super().get_batch_iterator(dataset, *args, **kwargs)

    def max_positions(self) -> int:
        """Of the model, in tokens."""
        return self.cfg.max_positions

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary
