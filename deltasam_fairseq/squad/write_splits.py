"""Write the splits of a SQuAD data set as fairseq data: each whole or not at all, and only once."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from deltasam_fairseq.data.binarize import (
    Dictionary,
    Encoding,
    Map,
    in_chunks,
    tools,
    write_items,
)
from deltasam_fairseq.data.files import DataError, atomic_write, sha256
from deltasam_fairseq.glue.write_splits import RECORD, read_record, without_paths
from deltasam_fairseq.squad.read_json import Question, Squad, read_squad
from deltasam_fairseq.squad.token_offsets import Encoded, encode
from deltasam_fairseq.squad.windows import Layout, Window

VERSION = 1  # of task.json, and of how the data is written
ENDINGS = ("bin", "idx", "windows.npy", "offsets.bin", "offsets.idx", "json")
# Of SPLIT.windows.npy, as the task reads them; the last but one is the number of the question.
COLUMNS = ("start", "end", "begin", "stop", "own_begin", "own_stop", "question", "first")
INTEGERS = 1 << 30  # a vocabulary of numbers that need 32 bits


class Split(NamedTuple):
    """One split to write: where it comes from, where it goes."""

    name: str  # fairseq's: train, valid, test
    source: Path
    out: Path
    layout: Layout
    any_rows: bool
    fingerprint: str  # of all that the result depends on


def split_of(
    name: str, source: Path, out: Path, layout: Layout, any_rows: bool, bpe: Dict[str, Any]
) -> Split:
    """Return a split; raises a DataError if its file is missing."""
    if not source.is_file():
        raise DataError(f"--{name} {source}: no such file")
    facts = [VERSION, name, layout, any_rows, sha256(source), bpe["name"], bpe["sha256"]]
    facts += [bpe["options"].get("wordpiece_cased", False)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Split(name, source, out, layout, any_rows, digest)


def is_finished(split: Split) -> bool:
    """Whether an earlier run wrote this split, from the same file and with the same options."""
    there = all((split.out / f"{split.name}.{ending}").is_file() for ending in ENDINGS)
    entry = read_record(split.out).get(split.name, {})
    return there and entry.get("fingerprint") == split.fingerprint


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
    _check_known(split, encoding, [*contexts, *texts])
    for question in squad.questions:
        if not len(contexts[question.context].tokens):
            raise DataError(f"{split.source}, question {question.id}: its context is empty")
    return Content(squad, contexts, texts)


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
        "file": split.source.name,
        "questions": len(squad.questions),
        "windows": len(windows),
        "version_2": squad.version_2,
        "labelled": squad.labelled,
        "fingerprint": split.fingerprint,
    }


def _check_known(split: Split, encoding: Encoding, texts: List[Encoded]) -> None:
    """Refuse a dict.txt that does not belong to the BPE."""
    unk = tools(encoding)[1].unk()
    total = sum(len(text.tokens) for text in texts)
    unknown = sum(int((text.tokens == unk).sum()) for text in texts)
    if 2 * unknown > total:
        raise DataError(
            f"{split.source}: {unknown} of {total} tokens are not in --dict "
            f"{encoding.dictionary}; give the dict.txt that belongs to the BPE's files"
        )


def describe(layout: Layout, bpe: Dict[str, Any]) -> Dict[str, Any]:
    """Return what task.json says of all splits together."""
    return {
        "version": VERSION,
        "task": "span_prediction",
        "max_seq_length": layout.length,
        "doc_stride": layout.stride,
        "max_query_length": layout.query,
        "separators": layout.separators,
        "bpe": bpe,
    }


def others(splits: List[Split], description: Dict[str, Any]) -> Dict[str, Any]:
    """Return what task.json says of the splits that are in the folder but not asked for.

    Raises:
        DataError: they were made with other options or another BPE; one folder has one of each.
    """
    out, names = splits[0].out, {split.name for split in splits}
    found = {name: entry for name, entry in read_record(out).items() if name not in names}
    if not found:
        return {}
    old = json.loads((out / RECORD).read_text(encoding="utf-8"))
    for key, value in description.items():
        if without_paths(old.get(key)) != without_paths(value):
            files = " ".join(f"--{name} JSON" for name in found)
            raise DataError(
                f"--out {out} also has {', '.join(found)}, made with another {key}: make them anew "
                f"by giving {files} too, or give another --out"
            )
    return found


def write_splits(splits: List[Split], bpe: Dict[str, Any], encoding: Encoding, run: Map) -> None:
    """Write the splits that are not finished, after reading and encoding all of them.

    A split is entered in task.json when its files are there as a whole, and what belonged to an
    older one is removed first: a run that was cut leaves finished splits and no others. Splits of
    the folder that are not asked for stay.

    Raises:
        DataError: a file is not what it should be, or the folder has splits that do not go with
            these; nothing has been written then.
    """
    out = splits[0].out
    description = describe(splits[0].layout, bpe)
    old = read_record(out)
    there = others(splits, description)
    there.update({split.name: old[split.name] for split in splits if is_finished(split)})
    waiting = {
        split.name: read_split(split, encoding, run) for split in splits if split.name not in there
    }
    for name in waiting:
        for ending in ENDINGS:
            path = out / f"{name}.{ending}"
            if path.is_file():
                path.unlink()

    def save_record() -> None:
        atomic_write(out / RECORD, json.dumps({**description, "splits": there}, indent=1) + "\n")

    save_record()
    atomic_write(out / "dict.txt", Path(encoding.dictionary).read_bytes())
    for split in splits:
        if split.name not in waiting:
            print(f"{split.name}: already there, {out}")
            continue
        content = waiting.pop(split.name)
        entry = there[split.name] = write_split(split, content, tools(encoding)[1])
        save_record()
        left_out = content.squad.left_out
        dropped = f", {left_out} misplaced answers left out" if left_out else ""
        counts = f"{entry['questions']} questions, {entry['windows']} windows{dropped}"
        print(f"{split.name}: {counts} -> {out}", flush=True)
