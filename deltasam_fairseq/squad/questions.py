"""The questions of a prepared data set: their contexts, gold answers, and where tokens stand."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
from fairseq.data import data_utils

from deltasam_fairseq.data.splits import read_record

TASK = "span_prediction"
# Columns of SPLIT.windows.npy, one row a window. Positions are those of tokens in the window.
COLUMNS = (
    "start",  # position of the answer's first token; 0: no answer in this window
    "end",  # position of its last token
    "begin",  # position of the first token of the context
    "stop",  # position behind its last one
    "own_begin",  # the same of the tokens that have more context here than in any other window
    "own_stop",
    "question",  # number
    "first",  # which token of the context is at "begin"
)


class Question(NamedTuple):
    """A question, without its wording, which only the windows have.

    Attributes:
        id: as in the SQuAD file.
        context: the text that holds the answer.
        offsets: where every token of the context begins and ends in it, in characters, (n, 2).
        answers: the gold ones; empty: there is none.
        version_2: whether questions of this data may have no answer.
    """

    id: str
    context: str
    offsets: np.ndarray
    answers: Tuple[str, ...]
    version_2: bool

    def text(self, first: int, last: int) -> str:
        """The text from one token of the context to another, both included."""
        return self.context[self.offsets[first][0] : self.offsets[last][1]]


class Questions:
    """Questions of several splits in one numbering; a split's are read when the first is needed."""

    def __init__(self) -> None:
        self._begins: Dict[str, int] = {}  # path of a split -> number of its first question
        self._count = 0
        self._read: Dict[str, Tuple[Any, Any]] = {}

    def add(self, split: Path, count: int) -> int:
        """Return the number of a split's first question.

        Args:
            split: path of its files without their endings.
            count: number of its questions.
        """
        if str(split) not in self._begins:
            self._begins[str(split)] = self._count
            self._count += count
        return self._begins[str(split)]

    def __getitem__(self, number: int) -> Question:
        path, begin = max(
            ((p, b) for p, b in self._begins.items() if b <= number), key=lambda pair: pair[1]
        )
        if path not in self._read:
            content = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
            self._read[path] = content, data_utils.load_indexed_dataset(f"{path}.offsets", None)
        content, offsets = self._read[path]
        name, context, answers = content["questions"][number - begin]
        return Question(
            name,
            content["contexts"][context],
            offsets[context].numpy().reshape(-1, 2),
            tuple(answers),
            content["version_2"],
        )


def read_span_record(data: Path) -> Dict[str, Any]:
    """Return what python -m deltasam_fairseq.squad.prepare recorded about a folder of data.

    Raises:
        ValueError: it did not write it.
    """
    record = read_record(data)
    if record.get("task") != TASK:
        raise ValueError(
            f"{data}: no data of --task {TASK}; make it with "
            "python -m deltasam_fairseq.squad.prepare"
        )
    return record


def read_windows(split: Path) -> Dict[str, List[int]]:
    """Return the columns of a split's windows.

    Args:
        split: path of its files without their endings.
    """
    table = np.load(f"{split}.windows.npy")
    return {name: table[:, i].tolist() for i, name in enumerate(COLUMNS)}
