"""Sets of semantic textual similarity: STS12 to STS16 in SentEval's layout, STS-B, SICK-R."""

import csv
from pathlib import Path
from typing import Dict, List

from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.sts.folder import Pair, lines_of, score_of

# Files of a year and their scored pairs. STS13's SMT may not be redistributed; no one has it.
YEARS: Dict[str, Dict[str, int]] = {
    "STS12": {
        "MSRpar": 750,
        "MSRvid": 750,
        "SMTeuroparl": 459,
        "surprise.OnWN": 750,
        "surprise.SMTnews": 399,
    },
    "STS13": {"FNWN": 189, "headlines": 750, "OnWN": 561},
    "STS14": {
        "deft-forum": 450,
        "deft-news": 300,
        "headlines": 750,
        "images": 750,
        "OnWN": 750,
        "tweet-news": 750,
    },
    "STS15": {
        "answers-forums": 375,
        "answers-students": 750,
        "belief": 375,
        "headlines": 750,
        "images": 750,
    },
    "STS16": {
        "answer-answer": 254,
        "headlines": 249,
        "plagiarism": 230,
        "postediting": 244,
        "question-question": 209,
    },
}
STS_B = {"train": 5749, "dev": 1500, "test": 1379}
SICK_TEST = 4927
SETS = (*YEARS, "STS-B", "SICK-R")


def _folder(root: Path, name: str) -> Path:
    return root / {"STS-B": "STSBenchmark", "SICK-R": "SICK"}.get(name, f"{name}-en-test")


def available(root: Path) -> List[str]:
    """Return the sets whose folder is there."""
    return [name for name in SETS if _folder(root, name).is_dir()]


def read_set(root: Path, name: str, any_rows: bool = False) -> List[Pair]:
    """Read the test pairs of a set, those without a score skipped.

    Args:
        root: folder that has ``STS12-en-test`` to ``STS16-en-test``, ``STSBenchmark``, ``SICK``.
        name: one of `SETS`.
        any_rows: whether another number of pairs than the published one is taken.

    Raises:
        DataError: there is no such set; a file is missing, damaged, or has other rows.
    """
    folder = _folder(root, name)
    if not folder.is_dir():
        there = ", ".join(available(root)) or "none"
        raise DataError(f"--sets {name}: not in --sts {root}, there are {there}; get {folder.name}")
    if name == "STS-B":
        return read_sts_b(folder / "sts-test.csv", "test", any_rows)
    if name == "SICK-R":
        path = folder / "SICK_test_annotated.txt"
        return _checked(_read_sick(path), SICK_TEST, f"--sts {path}", any_rows)
    pairs = []
    for part, count in YEARS[name].items():
        path = folder / f"STS.input.{part}.txt"
        pairs += _checked(_read_part(path), count, f"--sts {path}", any_rows)
    return pairs


def read_sts_b(path: Path, split: str, any_rows: bool = False, option: str = "--sts") -> List[Pair]:
    """Read a split of STS-B: fields between tabs, of which 5 to 7 are score and sentences."""
    pairs = []
    for number, line in enumerate(lines_of(path, option), start=1):
        fields = line.split("\t")
        place = f"{option} {path}, line {number}"
        if len(fields) < 7:
            raise DataError(f"{place}: {len(fields)} fields between tabs, STS-B has 7 or more")
        pairs.append(_pair(fields[4], fields[5], fields[6], place))
    return _checked(pairs, STS_B[split], f"{option} {path}", any_rows)


def _pair(score: str, first: str, second: str, place: str) -> Pair:
    first, second = first.strip(), second.strip()
    if not first or not second:
        raise DataError(f"{place}: a sentence is empty")
    return score_of(score, place), first, second


def _read_part(path: Path) -> List[Pair]:
    gold = path.with_name(path.name.replace("STS.input.", "STS.gs."))
    rows, scores = lines_of(path, "--sts"), lines_of(gold, "--sts")
    if len(rows) != len(scores):
        raise DataError(
            f"--sts {path}: {len(rows)} lines, {gold.name} {len(scores)}, which belong together "
            "line by line; get both again"
        )
    pairs = []
    for number, (row, score) in enumerate(zip(rows, scores), start=1):
        if not score.strip():
            continue
        place, fields = f"--sts {path}, line {number}", row.split("\t")
        if len(fields) < 2:
            raise DataError(f"{place}: no tab between two sentences")
        pairs.append(_pair(score, fields[0], fields[1], place))
    return pairs


def _read_sick(path: Path) -> List[Pair]:
    rows = csv.DictReader(lines_of(path, "--sts"), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = ("relatedness_score", "sentence_A", "sentence_B")
    missing = [name for name in columns if name not in (rows.fieldnames or ())]
    if missing:
        raise DataError(f"--sts {path}: its header has no column {', '.join(missing)}")
    pairs = []
    for number, row in enumerate(rows, start=2):
        score, first, second = (row[name] or "" for name in columns)
        pairs.append(_pair(score, first, second, f"--sts {path}, line {number}"))
    return pairs


def _checked(pairs: List[Pair], count: int, place: str, any_rows: bool) -> List[Pair]:
    if len(pairs) != count and not any_rows:
        raise DataError(
            f"{place}: {len(pairs)} scored pairs, published are {count}; get the file again, or "
            "give --any-rows to take what is there"
        )
    require_two_scores(pairs, place)
    return pairs


def require_two_scores(pairs: List[Pair], place: str) -> None:
    """Check that scores differ.

    Raises:
        DataError: they do not, or there are less than two.
    """
    if len({score for score, _, _ in pairs}) < 2:
        what = f"{len(pairs)} scored pair(s)"
        what = f"all scores are {pairs[0][0]:g}" if len(pairs) > 1 else what
        raise DataError(f"{place}: {what}; a correlation needs two different scores")
