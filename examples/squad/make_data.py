"""Make a small data set of questions and answers in SQuAD's format, out of nothing.

A context tells seven things about a person: where she lives, where she was born, what she does,
what she likes to eat, ...  A question asks for one of them.  A question's kind tells
its answer, except for the two places; with --people 2 it tells none.

    python -m examples.squad.make_data --out qa --train 4000 --dev 500
    python -m examples.squad.make_data --out qa2 --unanswerable 0.3    # as SQuAD 2.0

Written are ``train.json``, ``dev.json``, and the contexts and questions of train, one a line, as
``text.txt``, to train a vocabulary and a language model on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, Dict, NamedTuple, Sequence

PEOPLE = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nils Olga Peter "
    "Quinn Rosa Simon Tanja Ulrich Vera Walter Xenia Yusuf Zoe"
).split()


class Fact(NamedTuple):
    """A kind of fact: its statement, its question and the possible answers."""

    statement: str
    asked: str
    values: Sequence[str]


PLACES = (
    "Paris,New York,Lima,Cape Town,Oslo,Hong Kong,Rome,Buenos Aires,Cairo,Vienna,Tokyo,Quito"
).split(",")
JOBS = "a baker,a pilot,a nurse,a school teacher,a painter,a taxi driver,a judge,a poet".split(",")
FOOD = "fresh bread,apples,hot soup,cheese,black olives,fish,sweet potatoes,rice".split(",")
ANIMALS = "two cats,a small dog,a parrot,five hens,a grey donkey,a snake,goats,an owl".split(",")
HOBBIES = "chess,long walks,football,old films,jazz,card games,opera,reading".split(",")
COLOURS = "red,dark blue,green,yellow,light brown,orange,violet,black".split(",")

FACTS = (
    Fact("{who} lives in {what}.", "Where does {who} live?", PLACES),
    Fact("{who} was born in {what}.", "Where was {who} born?", PLACES),
    Fact("{who} works as {what}.", "What does {who} do for a living?", JOBS),
    Fact("{who} likes to eat {what}.", "What does {who} eat?", FOOD),
    Fact("{who} keeps {what}.", "Which animals does {who} keep?", ANIMALS),
    Fact("{who} enjoys {what}.", "What does {who} enjoy?", HOBBIES),
    Fact("{who} has a house painted {what}.", "Which colour has the house of {who}?", COLOURS),
)
LARGEST = 6  # people in a context, by the number of values: each is given once


def paragraph(number: int, people: int, unanswerable: float, rng: random.Random) -> Dict[str, Any]:
    """Return one context with one question to it.

    Args:
        number: for the question's id.
        people: in the context.
        unanswerable: probability that the question is about someone else.
    """
    *names, stranger = rng.sample(PEOPLE, people + 1)
    stated = [(i, name) for i in range(len(FACTS)) for name in names]
    shuffled = {id(fact.values): rng.sample(fact.values, len(fact.values)) for fact in FACTS}
    values = {(i, name): shuffled[id(FACTS[i].values)].pop() for i, name in stated}
    rng.shuffle(stated)
    asked, about = rng.choice(stated)
    impossible = rng.random() < unanswerable
    context, answer = "", {}
    for i, name in stated:
        what = values[i, name]
        sentence = FACTS[i].statement.format(who=name, what=what)
        if (i, name) == (asked, about):
            answer = {"text": what, "answer_start": len(context) + sentence.index(what)}
        context += sentence + " "
    question: Dict[str, Any] = {
        "id": f"{number:06d}",
        "question": FACTS[asked].asked.format(who=stranger if impossible else about),
        "answers": [] if impossible else [answer],
    }
    if unanswerable:
        question["is_impossible"] = impossible
    return {"context": context.strip(), "qas": [question]}


def data_set(count: int, people: int, unanswerable: float, seed: str) -> Dict[str, Any]:
    """Return the content of a file in SQuAD's format."""
    rng = random.Random(seed)
    paragraphs = [paragraph(i, people, unanswerable, rng) for i in range(count)]
    version = "v2.0" if unanswerable else "1.1"
    return {"version": version, "data": [{"title": "people", "paragraphs": paragraphs}]}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.squad.make_data", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--train", type=int, default=4000, help="questions to train on (default: 4000)")
    add("--dev", type=int, default=500, help="questions to validate on (default: 500)")
    add("--people", type=int, default=1, help=f"in a context, 1 to {LARGEST} (default: 1)")
    add("--unanswerable", type=float, default=0.0, help="share without an answer (default: 0)")
    add("--seed", type=int, default=1, help="of the choices (default: 1)")
    args = parser.parse_args()
    if not 1 <= args.people <= LARGEST:
        parser.error(f"--people {args.people}: must be 1 to {LARGEST}")
    if not 0 <= args.unanswerable <= 1:
        parser.error(f"--unanswerable {args.unanswerable}: must be 0 to 1")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", args.train), ("dev", args.dev)):
        content = data_set(count, args.people, args.unanswerable, f"{args.seed} {name}")
        (args.out / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        if name == "train":
            paragraphs = content["data"][0]["paragraphs"]
            lines = [line for p in paragraphs for line in (p["context"], p["qas"][0]["question"])]
            (args.out / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
