"""Write the splits of a SQuAD data set as fairseq data."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from deltasam_fairseq.data import splits as data_splits
from deltasam_fairseq.data.binarize import (
    Dictionary,
    Encoding,
    Map,
    in_chunks,
    tools,
    unknown_share,
    write_items,
)
from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.splits import (
    Entry,
    entries_of,
    fingerprint,
    is_finished,
    read_record,
    without_paths,
)
from deltasam_fairseq.squad.questions import COLUMNS, TASK
from deltasam_fairseq.squad.read_json import Question, Squad, read_squad
from deltasam_fairseq.squad.token_offsets import Encoded, encode
from deltasam_fairseq.squad.windows import Layout, Window

VERSION = 2  # of task.json, and of how the data is written
ENDINGS = ("bin", "idx", "windows.npy", "offsets.bin", "offsets.idx", "json")
INTEGERS = 1 << 30  # a vocabulary of numbers that need 32 bits


class Split(NamedTuple):
    """One split to write: where it comes from, where it goes."""

    name: str  # fairseq's: train, valid, test
    source: Path
    out: Path
    layout: Layout
    any_rows: bool
    fingerprint: str  # of all that the result depends on

    def files(self) -> List[Path]:
        """Return the files that the finished split consists of."""
        return [self.out / f"{self.name}.{ending}" for ending in ENDINGS]


def split_of(
    name: str, source: Path, out: Path, layout: Layout, any_rows: bool, bpe: Dict[str, Any]
) -> Split:
    """Return a split; raises a DataError if its file is missing."""
    if not source.is_file():
        raise DataError(f"--{name} {source}: no such file")
    digest = fingerprint([VERSION, name, layout, any_rows], source, bpe)
    return Split(name, source, out, layout, any_rows, digest)


def answer_tokens(question: Question, context: Encoded) -> Optional[Tuple[int, int]]:
    """Return the first and the last token of the first gold answer; None if there is none."""
    if not question.answers:
        return None
    text, start = question.answers[0]
    first, last = context.span(start, start + len(text))
    return (first, last) if first <= last else None


class Content(NamedTuple):
    """What a split's file holds, and the tokens of its contexts and of its questions."""

    squad: Squad
    contexts: List[Encoded]
    texts: List[Encoded]


def read_split(split: Split, encoding: Encoding, run: Map) -> Content:
    """Read and encode one split; answers are needed in all but test.

    Raises:
        DataError: the file is not what it should be, or does not go with the BPE and dict.txt.
    """
    squad = read_squad(split.source, split.name != "test", split.any_rows)
    work = functools.partial(encode, encoding)
    contexts: List[Encoded] = in_chunks(work, squad.contexts, run)
    texts: List[Encoded] = in_chunks(work, [question.text for question in squad.questions], run)
    unknown_share(split.source, encoding, [text.tokens for text in (*contexts, *texts)])
    kept = []
    for i, question in enumerate(squad.questions):
        context, place = contexts[question.context], f"{split.source}, question {question.id}"
        if not len(context.tokens):
            raise DataError(f"{place}: its context is empty")
        for text, start in question.answers[:1]:
            if context.covers(squad.contexts[question.context], start, start + len(text)):
                kept.append(i)
            elif not split.any_rows:
                raise DataError(
                    f"{place}: the answer {text!r} is of characters that --bpe {encoding.bpe} "
                    "drops, or begins or ends with a word of such; correct it, or take another "
                    "BPE (--any-rows drops such questions)"
                )
        if not question.answers:
            kept.append(i)
    dropped = squad.dropped + len(squad.questions) - len(kept)
    squad = squad._replace(questions=[squad.questions[i] for i in kept], dropped=dropped)
    return Content(squad, contexts, [texts[i] for i in kept])


def write_split(split: Split, content: Content, dictionary: Dictionary) -> Dict[str, Any]:
    """Write one split; return what task.json says of it."""
    squad, contexts, texts = content
    windows: List[Window] = []
    numbers: List[int] = []
    for i, (question, text) in enumerate(zip(squad.questions, texts)):
        context = contexts[question.context]
        found = split.layout.windows(
            text.tokens,
            context.tokens,
            answer_tokens(question, context),
            dictionary.bos(),
            dictionary.eos(),
        )
        windows += found
        numbers += [i] * len(found)
    rows = [
        [number if name == "question" else getattr(window, name) for name in COLUMNS]
        for window, number in zip(windows, numbers)
    ]
    table = io.BytesIO()
    np.save(table, np.array(rows, dtype=np.int32))
    prefix = split.out / split.name
    write_items((window.tokens for window in windows), len(dictionary), prefix)
    offsets = (context.offsets.reshape(-1) for context in contexts)
    write_items(offsets, INTEGERS, Path(f"{prefix}.offsets"))
    atomic_write(Path(f"{prefix}.windows.npy"), table.getvalue())
    questions = {
        "version_2": squad.version_2,
        "contexts": squad.contexts,
        "questions": [[q.id, q.context, [a.text for a in q.answers]] for q in squad.questions],
    }
    atomic_write(Path(f"{prefix}.json"), json.dumps(questions))
    return {
        "questions": len(squad.questions),
        "windows": len(windows),
        "version_2": squad.version_2,
        "labelled": squad.labelled,
    }


def describe(layout: Layout, bpe: Dict[str, Any]) -> Dict[str, Any]:
    """Return what task.json says of all splits together."""
    return {
        "version": VERSION,
        "task": TASK,
        "max_seq_length": layout.length,
        "doc_stride": layout.stride,
        "max_query_length": layout.query,
        "separators": layout.separators,
        "bpe": bpe,
    }


def other_entries(splits: List[Split], description: Dict[str, Any]) -> Dict[str, Entry]:
    """Return the entries of the splits that are in the folder but not asked for.

    Raises:
        DataError: they were made with other options or another BPE; one folder has one of each.
    """
    out, names = splits[0].out, {split.name for split in splits}
    found = {name: entry for name, entry in entries_of(out).items() if name not in names}
    old = read_record(out)
    for key, value in description.items():
        if found and without_paths(old.get(key)) != without_paths(value):
            files = " ".join(f"--{name} JSON" for name in found)
            raise DataError(
                f"--out {out} also has {', '.join(found)}, made with another {key}: make them "
                f"again by giving {files} too, or give another --out"
            )
    return found


def write_splits(splits: List[Split], bpe: Dict[str, Any], encoding: Encoding, run: Map) -> None:
    """Write the splits that are not finished, after reading and encoding all of them.

    Splits of the folder that are not asked for stay.

    Raises:
        DataError: a file is not what it should be, or the folder has splits that do not go with
            these; nothing has been written then.
    """
    description, old = describe(splits[0].layout, bpe), entries_of(splits[0].out)
    entries = other_entries(splits, description)
    entries.update({split.name: old[split.name] for split in splits if is_finished(split)})
    waiting = [split for split in splits if split.name not in entries]
    contents = {split.name: read_split(split, encoding, run) for split in waiting}
    stale = [path for split in waiting for path in split.files() if path.is_file()]
    dictionaries = {"dict.txt": Path(encoding.dictionary).read_bytes()}

    def write(split: Split) -> Tuple[Entry, str]:
        content = contents.pop(split.name)
        entry = write_split(split, content, tools(encoding)[1])
        number = content.squad.dropped
        dropped = f", {number} misplaced answers dropped" if number else ""
        return entry, f"{entry['questions']} questions, {entry['windows']} windows{dropped}"

    data_splits.write_splits(splits, description, entries, dictionaries, stale, write)
