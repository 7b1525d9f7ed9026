"""Record in a checkpoint what data it was trained on.

What fits by its size need not be the same: two dictionaries of 52 words, classes ``neg pos`` and
``pos neg``, scores divided by 1 and by 5. A `DataRecord` says what the numbers mean that go into a
model and come out of it. Training stores one in every checkpoint, so that it holds when the data
folder is gone; for an older checkpoint it is read from the folder that the checkpoint names.

`fit_to_data` compares two of them. docs/checkpoints.md has the table of what is compared.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from fairseq import utils
from fairseq.data import Dictionary
from omegaconf.errors import OmegaConfBaseException

KEY = "deltasam_data"  # in a checkpoint's extra_state

_FILLERS = ("<mask>", "madeupword")  # what fairseq appends to a dictionary
_STORED = "its own record"
_SHOWN = 4  # words, in an error


@dataclass
class Words:
    """The symbols of a dictionary in their order, without those that fairseq appends.

    Attributes:
        count: how many.
        sha256: digest of all, in their order.
        first: the first that are words, to be shown.
        symbols: all, where the dictionary is at hand; not stored.
    """

    count: int
    sha256: str
    first: List[str]
    symbols: Optional[Sequence[str]] = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, dictionary: Dictionary) -> "Words":
        """Describe a dictionary."""
        symbols = [str(symbol) for symbol in dictionary.symbols]
        while symbols and symbols[-1].startswith(_FILLERS):
            symbols.pop()
        begin = dictionary.nspecial
        first = symbols[begin : begin + _SHOWN]
        return cls(len(symbols), _digest(symbols), first, symbols)

    def same(self, other: "Words") -> bool:
        """Whether the words that both have, have the same numbers.

        One may go on where the other ends: a word that replaces a filler disturbs none.
        """
        return self.sha256 == other.sha256 or self._begins(other) or other._begins(self)

    def _begins(self, other: "Words") -> bool:
        return other.symbols is not None and _digest(other.symbols[: self.count]) == self.sha256

    def shown(self, other: "Words") -> str:
        """Say how many, and the first words; if all are known, from where it differs on."""
        words, at = self.first, 0
        if self.symbols and other.symbols:
            pairs = enumerate(zip(self.symbols, other.symbols))
            at = next((i for i, (a, b) in pairs if a != b), 0)
            words = list(self.symbols[at : at + _SHOWN])
        where = f", from number {at} on" if at else ""
        return f"{self.count} words{where} {' '.join(words)} ..."


def _digest(symbols: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(symbols).encode("utf-8", "surrogateescape")).hexdigest()


def label_names(dictionary: Dictionary) -> List[str]:
    """Return the names of the classes in their order, without what fairseq appends."""
    symbols = dictionary.symbols[dictionary.nspecial :]
    return [str(symbol) for symbol in symbols if not symbol.startswith(_FILLERS)]


@dataclass
class DataRecord:
    """What the inputs and the outputs of a model mean. None: not known, and not compared.

    Attributes:
        words: the dictionaries, ``source`` and, where it is another one, ``target``.
        labels: names of the classes, in the order of their numbers.
        classes: how many outputs the model has; of data it is not known.
        regression: whether the targets are scores.
        scale: what glue.prepare divided the scores by.
        sentences: how many there are in an example.
        columns: names of the columns that they were read from, in their order.
        languages: --source-lang and --target-lang.
        tokens: --init-token and --separator-token; of a folder they are not known, as they are
            options of training. [None, None]: without either.
        max_positions: --max-positions.
        head: name of the classification head.
        task: name of the prepared task, such as RTE.
        encoding: BPE, digests of its files, options.
        separators: how many tokens stand between question and context (span_prediction).
        origin: where this is known from; not stored.
    """

    words: Dict[str, Words] = field(default_factory=dict)
    labels: Optional[List[str]] = None
    classes: Optional[int] = None
    regression: Optional[bool] = None
    scale: Optional[float] = None
    sentences: Optional[int] = None
    columns: Optional[List[str]] = None
    languages: Optional[List[str]] = None
    tokens: Optional[List[Optional[int]]] = None
    max_positions: Optional[int] = None
    head: Optional[str] = None
    task: Optional[str] = None
    encoding: Optional[List[Any]] = None
    separators: Optional[int] = None
    origin: str = field(default="", compare=False)

    @property
    def known(self) -> bool:
        """Whether anything is known of the data itself: it is stored, or its folder is there."""
        return (
            self.origin == _STORED
            or bool(self.words)
            or self.labels is not None
            or self.sentences is not None
        )

    @classmethod
    def of_folder(
        cls, data: Union[str, Path], tokens: Optional[List[Optional[int]]] = None
    ) -> "DataRecord":
        """Describe a data folder, made by this project or by fairseq; nothing is known of none.

        Args:
            data: the folder.
            tokens: --init-token and --separator-token that will be used with it, if known.
        """
        data = Path(data)
        record = cls(tokens=tokens, origin=f"folder {data}")
        record._read_words(data / "dict.txt")
        record._read_words(data / "input0" / "dict.txt")
        names = data / "label" / "dict.txt"
        record.labels = label_names(Dictionary.load(str(names))) if names.is_file() else None
        count = 0
        while any((data / f"input{count}").glob("*.idx")):
            count += 1
        record.sentences = count or None
        made = read_json(data / "task.json")
        record.task, record.columns = made.get("task"), made.get("columns")
        record.separators = made.get("separators")
        if made:
            record.encoding = encoding_facts(made.get("bpe") or {})
        if "scale" in made:
            record.scale, record.regression = made["scale"], made["scale"] is not None
        if record.regression:
            record.labels = None
        return record

    @classmethod
    def of_task(cls, task: Any) -> "DataRecord":
        """Describe the data that a task of fairseq is set up with."""
        cfg = getattr(task, "cfg", None)
        record = cls.of_folder(utils.split_paths(str(_option(cfg, "data") or os.devnull))[0])
        record.words = _words_of(task)
        labels = getattr(task, "label_dictionary", None)
        record.labels = label_names(labels) if isinstance(labels, Dictionary) else None
        record._take_options(cfg)
        return record

    @classmethod
    def of_checkpoint(cls, state: Dict[str, Any]) -> "DataRecord":
        """Return what a checkpoint says of its data; if it says nothing, what the folder says.

        Args:
            state: as read from the file, its ``data`` not overridden.
        """
        stored = (state.get("extra_state") or {}).get(KEY)
        if stored is not None:
            return cls.of_plain(stored)
        cfg = state.get("cfg")
        options = _option(cfg, "task") if cfg else state.get("args")
        data = utils.split_paths(str(_option(options, "data") or os.devnull))[0]
        record = cls.of_folder(data)
        for side in ("source", "target"):
            record._read_words(Path(data) / f"dict.{_option(options, f'{side}_lang')}.txt", side)
        record._take_options(options, _option(cfg, "criterion") if cfg else options)
        return record

    def _read_words(self, path: Path, side: str = "source") -> None:
        """Add the words of a dict.txt, if it is there."""
        if path.is_file():
            self.words[side] = Words.of(Dictionary.load(str(path)))

    def _take_options(self, *nodes: Any) -> None:
        """Add what the options of a task, and of a criterion, say."""

        def option(name: str) -> Any:
            return next((v for v in (_option(n, name) for n in nodes) if v is not None), None)

        if option("num_classes") is not None:
            self.classes = option("num_classes")
            self.tokens = [option("init_token"), option("separator_token")]
        languages = [option("source_lang"), option("target_lang")]
        self.languages = languages if all(languages) else None
        positions = option("max_positions")
        self.max_positions = positions if isinstance(positions, int) else None
        self.head = option("classification_head_name")
        regression = option("regression_target")
        if regression is not None:
            self.regression = regression
            if regression:
                self.labels = None
            else:
                self.scale = None

    def plain(self) -> Dict[str, Any]:
        """As plain values, to be stored in a checkpoint; of a dictionary its digest."""
        found = dataclasses.asdict(dataclasses.replace(self, words={}))
        del found["origin"]
        for side, words in self.words.items():
            entry = {"count": words.count, "sha256": words.sha256, "first": list(words.first)}
            found["words"][side] = entry
        return found

    @classmethod
    def of_plain(cls, stored: Dict[str, Any]) -> "DataRecord":
        """The reverse of `plain`."""
        words = {side: Words(**entry) for side, entry in stored["words"].items()}
        names = {f.name for f in dataclasses.fields(cls)}
        known = {name: value for name, value in stored.items() if name in names}
        return cls(**{**known, "words": words, "origin": _STORED})


def _option(node: Any, name: str) -> Any:
    """An option of fairseq's configuration, in any of the forms in which checkpoints have it."""
    with contextlib.suppress(AttributeError, KeyError, ValueError, OmegaConfBaseException):
        return node.get(name) if hasattr(node, "get") else getattr(node, name)
    return None


def read_json(path: Path) -> Dict[str, Any]:
    """Return a JSON file; empty if it is missing, broken or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def encoding_facts(bpe: Dict[str, Any]) -> List[Any]:
    """What task.json says of a BPE, without where its files are."""
    cased = bool(bpe.get("options", {}).get("wordpiece_cased", False))
    return [bpe.get("name"), bpe.get("sha256"), cased]


def _words_of(task: Any) -> Dict[str, Words]:
    found: Dict[str, Dictionary] = {}
    for side in ("source", "target"):
        with contextlib.suppress(NotImplementedError, AttributeError, KeyError, TypeError):
            dictionary = getattr(task, f"{side}_dictionary")
            if isinstance(dictionary, Dictionary) and dictionary is not found.get("source"):
                found[side] = dictionary
    return {side: Words.of(dictionary) for side, dictionary in found.items()}
