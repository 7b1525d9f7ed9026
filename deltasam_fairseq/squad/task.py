"""Extractive question answering in SQuAD's format, as a task of fairseq.

The data is what ``python -m deltasam_fairseq.squad.prepare`` writes: windows
``<s> question </s></s> context </s>``, already of their final length.
"""

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import models
from fairseq.data import (
    Dictionary,
    IdDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    RawLabelDataset,
    RightPadDataset,
    SortDataset,
    data_utils,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, OmegaConf, open_dict

from deltasam_fairseq.squad.head import SPAN_HEAD, register_span_head
from deltasam_fairseq.squad.questions import Questions, read_span_record, read_windows

logger = logging.getLogger(__name__)


@dataclass
class SpanPredictionConfig(FairseqDataclass):
    """Where the data is, and how much of it the model sees at a time."""

    data: str = field(
        default=MISSING,
        metadata={"help": "folder written by python -m deltasam_fairseq.squad.prepare"},
    )
    max_positions: int = field(
        default=512, metadata={"help": "tokens that the model has positions for (default: 512)"}
    )
    no_shuffle: bool = field(
        default=False, metadata={"help": "take the windows in the order of the file"}
    )
    seed: int = II("common.seed")


@register_task("span_prediction", dataclass=SpanPredictionConfig)
class SpanPredictionTask(FairseqTask):
    """Windows of contexts, in which an answer begins and ends at a token, or is not.

    Attributes:
        questions: of all splits that were loaded, by number.
        head_name: of the model's head.
        needs_answers: whether splits without answers are refused; prediction needs none.
    """

    head_name = SPAN_HEAD
    needs_answers = True

    def __init__(self, cfg: Any, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary
        self.questions = Questions()

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        """Read a dict.txt and add <mask>, as fairseq's masked_lm does."""
        dictionary = Dictionary.load(filename)
        dictionary.add_symbol("<mask>")
        return dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "SpanPredictionTask":
        """Read the dictionary.

        Raises:
            ValueError: the folder is not one of prepared data, or its windows are too long.
        """
        record = read_span_record(Path(cfg.data))
        longest = record["max_seq_length"]
        if longest > cfg.max_positions:
            raise ValueError(
                f"--max-positions {cfg.max_positions}: the windows of {cfg.data} have up to "
                f"{longest} tokens; prepare them with --max-seq-length {cfg.max_positions}"
            )
        return cls(cfg, cls.load_dictionary(str(Path(cfg.data) / "dict.txt")))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split, such as train, valid, test.

        Raises:
            FileNotFoundError: there is no such split.
            ValueError: it has no answers, to train on or to validate with.
        """
        data = Path(self.cfg.data)
        splits = read_span_record(data)["splits"]
        if split not in splits:
            raise FileNotFoundError(
                f"{data} has no split {split}, it has {', '.join(splits) or 'none'}; make it with "
                "python -m deltasam_fairseq.squad.prepare"
            )
        if self.needs_answers and not splits[split].get("labelled", True):
            raise ValueError(
                f"{data}: the split {split} has no answers, so that there is nothing to train on "
                "or to validate with; remove it from --valid-subset, and use "
                "python -m deltasam_fairseq.squad.predict for its answers"
            )
        tokens = data_utils.load_indexed_dataset(str(data / split), self.dictionary)
        columns = read_windows(data / split)
        begin = self.questions.add(data / split, splits[split]["questions"])
        window = {name: RawLabelDataset(columns[name]) for name in columns}
        targets = RawLabelDataset(list(zip(columns["start"], columns["end"])))
        del window["start"], window["end"]
        window["question"] = RawLabelDataset([begin + q for q in columns["question"]])
        dataset: Any = NestedDictionaryDataset(
            {
                "id": IdDataset(),
                "net_input": {
                    "src_tokens": RightPadDataset(tokens, pad_idx=self.dictionary.pad()),
                    "src_lengths": NumelDataset(tokens, reduce=False),
                },
                "target": targets,
                "window": window,
                "nsentences": NumSamplesDataset(),
                "ntokens": NumelDataset(tokens, reduce=True),
            },
            sizes=[tokens.sizes],
        )
        if not self.cfg.no_shuffle:
            with data_utils.numpy_seed(self.cfg.seed):
                dataset = SortDataset(dataset, sort_order=[np.random.permutation(len(tokens))])
        logger.info(f"{split}: {len(tokens)} windows of {splits[split]['questions']} questions")
        self.datasets[split] = dataset
        return dataset

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model and give it a head; `register_span_head` names what it can be."""
        with open_dict(cfg) if OmegaConf.is_config(cfg) else contextlib.nullcontext():
            cfg.max_positions = self.cfg.max_positions
        model = models.build_model(cfg, self, from_checkpoint)
        register_span_head(model)
        return model

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, with batches of any number of windows.

        With --required-batch-size-multiple 8, its default, fairseq-fixed 0.12.3.1 leaves up to 7
        windows out, in validation too.
        """
        kwargs["required_batch_size_multiple"] = 1
        return super().get_batch_iterator(*args, **kwargs)

    def max_positions(self) -> int:
        """Of the model, in tokens."""
        return self.cfg.max_positions

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary
