"""A prepared folder: its record, task.json, and its splits, each there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

from deltasam_fairseq.checkpoints.data_record import encoding_facts, read_json
from deltasam_fairseq.data.files import atomic_write, sha256

RECORD = "task.json"
Entry = Dict[str, Any]  # what the record says of one split


class Split(Protocol):
    """One split to write."""

    @property
    def name(self) -> str:
        """fairseq's: train, valid, valid1, test, ..."""

    @property
    def source(self) -> Path:
        """The file it is made of."""

    @property
    def out(self) -> Path:
        """The prepared folder."""

    @property
    def fingerprint(self) -> str:
        """Of all that the result depends on."""

    def files(self) -> List[Path]:
        """Return the files that it consists of when it is finished."""


S = TypeVar("S", bound=Split)


def read_record(folder: Path) -> Dict[str, Any]:
    """Return what an earlier preparation recorded; empty if there is no record, or a broken one."""
    return read_json(folder / RECORD)


def entries_of(folder: Path) -> Dict[str, Entry]:
    """Return what the record says of each split."""
    return read_record(folder).get("splits", {})


def without_paths(value: Any) -> Any:
    """Return a value of a record to compare: of the files of a BPE not where they are."""
    return encoding_facts(value) if isinstance(value, dict) else value


def fingerprint(facts: Sequence[Any], source: Path, bpe: Dict[str, Any]) -> str:
    """Return the checksum of what a split depends on: ``facts``, its file, and the BPE."""
    everything = [*facts, sha256(source), without_paths(bpe)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def is_finished(split: Split) -> bool:
    """Whether an earlier run wrote this split, from the same file and with the same options."""
    found = entries_of(split.out).get(split.name, {}).get("fingerprint")
    return found == split.fingerprint and all(path.is_file() for path in split.files())


def write_splits(
    splits: Sequence[S],
    record: Dict[str, Any],
    entries: Dict[str, Entry],
    dictionaries: Mapping[str, Union[str, bytes]],
    stale: Iterable[Path],
    write: Callable[[S], Tuple[Entry, str]],
    label: str = "",
) -> None:
    """Write the splits that have no entry yet.

    A split is recorded when its files are there as a whole, and what belonged to an older one is
    removed first: a run that was cut leaves finished splits and no others.

    Args:
        record: all of the record but its splits.
        entries: of the splits that stay.
        dictionaries: path in the folder -> content.
        stale: files to remove first.
        write: writes one split; returns its entry and what to print.
        label: printed before a split's name.
    """
    out = splits[0].out
    for path in stale:
        path.unlink()

    def save() -> None:
        atomic_write(out / RECORD, json.dumps({**record, "splits": entries}, indent=1) + "\n")

    save()
    for name, content in dictionaries.items():
        atomic_write(out / name, content)
    for split in splits:
        if split.name in entries:
            print(f"{label}{split.name}: already there, {out}")
            continue
        entry, message = write(split)
        source = {"file": split.source.name, "fingerprint": split.fingerprint}
        entries[split.name] = {**entry, **source}
        save()
        print(f"{label}{split.name}: {message} -> {out}", flush=True)
