"""A prepared folder of sentences: train.txt, scored pairs, and the BPE with its files."""

import math
from pathlib import Path
from typing import Any, List, Tuple

from deltasam_fairseq.data.binarize import build_bpe
from deltasam_fairseq.data.encoding_options import BPE_FILES
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.data.splits import read_record

TASK = "sentence_embedding"
PREPARE = "python -m deltasam_fairseq.sts.prepare"

Pair = Tuple[float, str, str]  # score, both sentences


def lines_of(path: Path, option: str) -> List[str]:
    """Return the lines of a text file, without line breaks.

    Args:
        option: of the command line, for the errors.

    Raises:
        DataError: no such file, or it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{option} {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path}: not a file of UTF-8 text ({error})") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def score_of(text: str, place: str) -> float:
    """Return a score; raises a DataError, which begins with ``place``, for what is no number."""
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{place}: the score {text!r} is not a number")
    return score


def read_bpe(folder: Path) -> Any:
    """Return the BPE of a prepared folder.

    Raises:
        DataError: it is no such folder, or a file is missing.
    """
    record = read_record(folder)
    if record.get("task") != TASK:
        raise DataError(f"{folder}: no folder of prepared sentences; make one with {PREPARE}")
    bpe = record["bpe"]
    files = {name: str(folder / bpe["options"][name]) for name in BPE_FILES[bpe["name"]]}
    for path in (folder / "dict.txt", *map(Path, files.values())):
        if not path.is_file():
            raise DataError(f"{path} is missing; make the folder again with {PREPARE}")
    return build_bpe(bpe["name"], **{**bpe["options"], **files})


def read_sentences(folder: Path) -> List[str]:
    """Return the sentences to train on; raises a FileNotFoundError without any."""
    path = folder / "train.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no split train; make it with {PREPARE} --train FILE")
    return lines_of(path, "train")


def read_pairs(folder: Path, split: str) -> List[Pair]:
    """Return the scored pairs of a split; raises a FileNotFoundError without any."""
    path = folder / f"{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no split {split}; {PREPARE} --valid FILE makes the split valid; or give "
            "--disable-validation"
        )
    rows = [line.split("\t") for line in lines_of(path, split)]
    return [(float(score), first, second) for score, first, second in rows]
