"""A stage of an example program: one command, the folder that it makes, and whether it is done."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple

from deltasam_fairseq.data.files import sha256

STAMP = "stage.json"  # written last: a folder that holds it is complete


def module(name: str, *arguments: object) -> List[str]:
    """Return the command that runs a module: ``python -m name``."""
    return [sys.executable, "-m", name, *map(str, arguments)]


class Stage(NamedTuple):
    """One command and the folder that it makes.

    Attributes:
        title: a few words to show.
        command: program and arguments; ``{out}`` stands for the folder to write.
        out: the folder in which the results are found afterwards.
        inputs: folders of earlier stages that it reads; remade whenever one of them was.
        seconds: expected on two cores, 0 if not known.
        removed_when_done: patterns of files to remove when the command has ended well.
        files: that it reads besides the absolute paths in the command; remade whenever the content
            of one of them changes.
    """

    title: str
    command: Sequence[str]
    out: Path
    inputs: Sequence[Path] = ()
    seconds: int = 0
    removed_when_done: Sequence[str] = ()
    files: Sequence[Path] = ()


def fingerprint(stage: Stage) -> str:
    """Hash the command and what it reads; a result with another hash is out of date.

    By which name Python was started makes no difference.
    """
    inputs = [read_stamp(folder).get("fingerprint", "") for folder in stage.inputs]
    program, *arguments = stage.command
    program = "python" if program == sys.executable else program
    given = [Path(word) for word in arguments if os.path.isabs(word) and os.path.isfile(word)]
    made = [folder.absolute() for folder in stage.inputs]  # known by their fingerprints
    given = [p for p in given if p.suffix != ".py" and not any(f in p.parents for f in made)]
    identity = [program, *arguments, *inputs, *map(content, [*given, *stage.files])]
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()


def content(path: Path) -> str:
    """Return a checksum of a file's content, of YAML that of its meaning; empty without a file."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return _content(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _content(path: Path, size: int, changed: int) -> str:
    if path.suffix != ".yaml":
        return sha256(path)
    import yaml  # is there with fairseq

    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def read_stamp(folder: Path) -> dict:
    """Return what was written when the stage ended; empty if it did not."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_done(stage: Stage) -> bool:
    """Whether the stage's folder is there, complete, and made by the same command."""
    return read_stamp(stage.out).get("fingerprint") == fingerprint(stage)


def split_words(words: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the words of a command line before ``--``, and those behind it."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def option_words(option: str) -> List[str]:
    """Return OPTION=VALUE, or OPTION, as words of a command; files by their absolute paths."""
    name, *value = option.split("=", 1)
    return ["--" + name, *(os.path.abspath(v) if os.path.isfile(v) else v for v in value)]


def sharpness_stage(title: str, run: Path, data: Path, checkpoint: str, *options: object) -> Stage:
    """Return the stage that measures how sharp the minimum is that a run ended in.

    Args:
        title: of the stage.
        run: folder of the run; the results go beside it, where the reports look for them.
        data: folder of the task's data.
        checkpoint: name of a file of the run.
        options: for the sharpness command.
    """
    command = [
        *(sys.executable, "-m", "deltasam_fairseq.sharpness", data, "--path", run / checkpoint),
        *(*options, "--max-batches", 10, "--json", "{out}/sharpness.json"),
    ]
    return Stage(title, [str(word) for word in command], sharpness_folder(run), [run])


def sharpness_folder(run: Path) -> Path:
    """Return the folder of what is measured of a run."""
    return run.with_name(run.name + "-sharpness")
