"""Reading SQuAD's JSON files, versions 1.1 and 2.0: questions, contexts, answers; their errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Set, Tuple, Type, TypeVar

from deltasam_fairseq.data.files import NOT_DATA, DataError

# Questions of the files that SQuAD publishes.
OFFICIAL = {
    "train-v1.1.json": 87599,
    "dev-v1.1.json": 10570,
    "train-v2.0.json": 130319,
    "dev-v2.0.json": 11873,
}
JSON_TYPES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list"}
T = TypeVar("T")


class Answer(NamedTuple):
    """A gold answer, and at which character of the context it begins."""

    text: str
    start: int


class Question(NamedTuple):
    """A question; ``context`` is a number in `Squad.contexts`, no answers: there is none."""

    id: str
    text: str
    context: int
    answers: Tuple[Answer, ...]


class Squad(NamedTuple):
    """What a file holds.

    Attributes:
        version_2: questions may have no answer, and are scored as SQuAD 2.0 does it.
        labelled: the answers are known.
        dropped: number of answers that were not in their contexts, with ``any_rows``.
    """

    contexts: List[str]
    questions: List[Question]
    version_2: bool
    labelled: bool
    dropped: int


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: it is missing, is something else, or is cut short.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give SQuAD's train-v1.1.json, or one like it")
    content = path.read_bytes()
    for pattern, what in NOT_DATA.items():
        if re.match(pattern, content[:512], re.IGNORECASE):
            raise DataError(f"{path} is {what}")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); was the download cut short? fetch it again"
        ) from error


def value(entry: Dict[str, Any], key: str, kind: Type[T], place: str) -> T:
    """Return ``entry[key]``, which is of that type: nothing is taken for what it is not.

    Args:
        place: where the entry stands, for errors.

    Raises:
        KeyError: it is not there.
        DataError: it is of another type, or a string with half of a surrogate pair.
    """
    found = entry[key]
    if type(found) is not kind:  # true is an int to isinstance
        raise DataError(f"{place}: {key} is {json.dumps(found):.40}, not {JSON_TYPES[kind]}")
    if isinstance(found, str):
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: {key} has half of a surrogate pair, {ascii(found[error.start])}, at "
                f"character {error.start}, which is no text; was a text cut between the two?"
            ) from error
    return found


def read_squad(path: Path, labelled: bool = True, any_rows: bool = False) -> Squad:
    """Read a file of SQuAD's layout.

    Args:
        labelled: whether answers are needed; without, they are read if all questions have some, or
            say that there is none (``is_impossible``).
        any_rows: take an official file that lacks questions, and drop answers that are not
            where the file says.

    Raises:
        DataError: naming the file, the question, and what is wrong.
    """
    content = read_json(path)
    contexts: List[str] = []
    found: List[Tuple[int, Dict[str, Any]]] = []
    ids, texts = [], []
    try:
        for i, article in enumerate(content["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"{path}, data[{i}].paragraphs[{j}]"
                for k, entry in enumerate(paragraph["qas"]):
                    ids.append(value(entry, "id", str, f"{place}.qas[{k}]"))
                    texts.append(value(entry, "question", str, f"{path}, question {ids[-1]}"))
                    if "is_impossible" in entry:
                        value(entry, "is_impossible", bool, f"{path}, question {ids[-1]}")
                    found.append((len(contexts), entry))
                contexts.append(value(paragraph, "context", str, place))
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} has not SQuAD's layout ({type(error).__name__}: {error}): data, paragraphs, "
            "context, qas, id, question"
        ) from error
    _check_questions(path, ids, any_rows)
    labelled = labelled or all(e.get("answers") or e.get("is_impossible") for _, e in found)
    version_2 = str(content.get("version", "")).lstrip("v").startswith("2")
    version_2 = version_2 or any(entry.get("is_impossible") for _, entry in found)
    questions, dropped = [], 0
    for name, text, (context, entry) in zip(ids, texts, found):
        answers: Sequence[Answer] = ()
        if labelled and not entry.get("is_impossible"):
            every = _answers(path, name, entry, version_2)
            wrong = [answer for answer in every if not _is_there(answer, contexts[context])]
            if wrong and not any_rows:
                raise DataError(
                    f"{path}, question {name}: the answer {wrong[0].text!r} does not stand at "
                    f"character {wrong[0].start} of its context; answer_start counts characters "
                    "from 0 (--any-rows drops such answers)"
                )
            answers = [answer for answer in every if answer not in wrong]
            dropped += len(wrong)
            if every and not answers:
                continue
        questions.append(Question(name, text, context, tuple(answers)))
    if not questions:
        raise DataError(f"{path} has no questions")
    return Squad(contexts, questions, version_2, labelled, dropped)


def _check_questions(path: Path, ids: Sequence[str], any_rows: bool) -> None:
    seen: Set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"{path}: two questions have the id {name}; give each its own")
        seen.add(name)
    official = OFFICIAL.get(path.name, len(ids))
    if len(ids) != official and not any_rows:
        raise DataError(
            f"{path}: {len(ids)} questions, official are {official}; is the download complete and "
            "unchanged? (--any-rows goes on with them)"
        )


def _answers(path: Path, name: str, entry: Dict[str, Any], version_2: bool) -> List[Answer]:
    place = f"{path}, question {name}"
    try:
        answers = [
            Answer(value(a, "text", str, place), value(a, "answer_start", int, place))
            for a in value(entry, "answers", list, place)
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}, question {name}: no answers with text and answer_start ({error}); a file "
            "without answers can be given to --test only"
        ) from error
    if not answers and not version_2:
        raise DataError(
            f'{path}, question {name}: no answer; in SQuAD 2.0 it has "is_impossible": true'
        )
    return answers


def _is_there(answer: Answer, context: str) -> bool:
    end = answer.start + len(answer.text)
    there = answer.start >= 0 and context[answer.start : end] == answer.text
    return there and bool(answer.text.strip())
