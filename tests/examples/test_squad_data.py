"""The built-in questions are valid SQuAD data, and their answers are true."""

import sys

import pytest

from deltasam_fairseq.squad.read_json import read_squad
from examples.squad import make_data as make_qa_data


def written(monkeypatch, out, *words):
    words = ["examples.squad.make_data", "--out", str(out), "--train", "60", "--dev", "20", *words]
    monkeypatch.setattr(sys, "argv", words)
    make_qa_data.main()
    return read_squad(out / "train.json"), read_squad(out / "dev.json")


@pytest.mark.parametrize("people", ["1", "4"])
def test_answers_are_true_and_the_only_ones(monkeypatch, tmp_path, people):
    for squad in written(monkeypatch, tmp_path, "--people", people):
        assert not squad.version_2
        for question in squad.questions:
            context = squad.contexts[question.context]
            true = [
                fact.statement.format(who=who, what=question.answers[0].text)
                for fact in make_qa_data.FACTS
                for who in make_qa_data.PEOPLE
                if fact.asked.format(who=who) == question.text
            ]
            assert len(true) == 1 and true[0] in context
            assert context.count(question.answers[0].text) == 1
            assert context.count(".") == 7 * int(people)


def test_unanswerable_ones_are_about_nobody_in_the_context(monkeypatch, tmp_path):
    train, _ = written(monkeypatch, tmp_path, "--unanswerable", "0.5", "--people", "2")
    none = [q for q in train.questions if not q.answers]
    assert train.version_2 and 15 < len(none) < 45
    for question in none:
        (who,) = [name for name in make_qa_data.PEOPLE if f" {name}" in question.text]
        assert who not in train.contexts[question.context]


def test_the_seed_is_all_that_it_depends_on(monkeypatch, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        written(monkeypatch, tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / name / "train.json").read_bytes() for name in "abc")
    assert a == b != c
    assert a != (tmp_path / "a" / "dev.json").read_bytes()
