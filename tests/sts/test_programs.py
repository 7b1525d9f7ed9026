"""Preparing sentences, validating and measuring embeddings; against transformers and scipy."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.sts import __main__ as sts
from deltasam_fairseq.sts import prepare
from deltasam_fairseq.sts.datasets import read_set
from deltasam_fairseq.sts.evaluation import load_model
from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE
from tests.helpers import runs, tiny


@pytest.fixture
def files(tmp_path):
    """Plain sentences, pairs, and a BERT vocabulary with its dict.txt."""
    data = tiny.write_sentences(tmp_path / "tiny")
    lines = (data / "train.txt").read_text().splitlines()
    (tmp_path / "sentences.txt").write_text("\n".join([*lines, "", lines[0], "  "]) + "\n")
    return tmp_path


def prepared(folder, *more):
    """Exit code of sts.prepare on the files."""
    data = folder / "tiny"
    words = ["--train", folder / "sentences.txt", "--valid", data / "valid.tsv"]
    words += ["--dict", data / "dict.txt", "--bpe", "wordpiece", "--out", folder / "out"]
    words += ["--wordpiece-vocab", data / "vocab.txt", *more]
    return prepare.main([str(word) for word in words])


class TestPrepare:
    def test_writes_what_the_task_reads(self, files, capsys):
        assert prepared(files) == 0
        out = capsys.readouterr().out
        assert "2 empty lines are skipped" in out
        assert "1 sentences that repeat an earlier one stay; --drop-duplicates drops them" in out
        argv = tiny.arguments(files / "out", files, criterion="nt_xent")
        task = tiny.build_trainer(argv).task
        assert len(task.dataset("train")) == 33
        task.load_dataset("valid")
        pair = task.dataset("valid")[0]
        assert 0 <= pair["target"] <= 1 and pair["first"][0] == task.dictionary.bos()

    def test_a_drawn_part_without_duplicates(self, files):
        parts = []
        for seed in (1, 1, 2):
            assert prepared(files, "--drop-duplicates", "--sentences", 30, "--seed", seed) == 0
            parts.append((files / "out" / "train.txt").read_text().splitlines())
        assert parts[0] == parts[1] != parts[2]
        assert len(set(parts[0])) == 30

    @pytest.mark.parametrize(
        "content, message",
        [
            ("one sentence\n", "1 sentences, contrastive learning needs two"),
            ("\n\n", "0 sentences, contrastive learning needs two"),
            ("w1 w2\n" * 3, "3 sentences, contrastive learning needs two different ones"),
            (None, "no such file"),
            (b"\xff\xfe", "not a file of UTF-8 text"),
            ("zz yy xx\nzz zz zz\nyy xx zz\n", "9 of 9 tokens are not in --dict"),
        ],
    )
    def test_bad_sentences(self, files, capsys, content, message):
        path = files / "sentences.txt"
        path.unlink()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert prepared(files) == 2
        found = capsys.readouterr()
        assert message in found.err and "->" not in found.out
        assert not (files / "out").exists()

    @pytest.mark.parametrize(
        "content, message",
        [
            ("", "is empty"),
            ("1\ta\tb\n", "1 scored pair(s); a correlation needs two"),
            ("1\ta\tb\n" * 3, "all scores are 1; a correlation needs two different scores"),
            ("1\tzz\tyy\n2\tzz\tyy\n", "4 of 4 tokens are not in --dict"),
            ("1\ta\tb\nx\ta\tb\n", "line 2: the score 'x' is not a number"),
            ("1\ta\n", "line 1: not score, sentence, sentence with tabs between"),
            ("g\tf\ty\ti\t2.5\ta\tb\n" * 3, "3 scored pairs, published are 1500"),
            ("g\tf\ty\ti\t2.5\ta\t\n" * 3, "line 1: a sentence is empty"),
        ],
    )
    def test_bad_pairs(self, files, capsys, content, message):
        (files / "pairs").write_text(content)
        assert prepared(files, "--valid", files / "pairs") == 2
        assert message in capsys.readouterr().err

    def test_equal_scores_in_sts_bs_layout(self, files, capsys):
        (files / "pairs").write_text("g\tf\ty\ti\t2.5\ta\tb\n" * 3)
        assert prepared(files, "--valid", files / "pairs", "--any-rows") == 2
        assert "all scores are 2.5; a correlation needs two" in capsys.readouterr().err

    def test_too_few_sentences(self, files, capsys):
        assert prepared(files, "--sentences", 99) == 2
        assert "33 sentences, --sentences is 99; give at most 33" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            prepared(files, "--sentences", 1)
        assert "--sentences: must be at least 2, got 1" in capsys.readouterr().err

    def test_out_is_a_file(self, files, capsys):
        assert prepared(files, "--out", files / "sentences.txt") == 2
        assert "sentences.txt: is a file; give a folder" in capsys.readouterr().err


def write_sts16(root, rows=1186):
    """STS16 in SentEval's layout, with an unscored pair, and the pairs that are to be read."""
    folder = root / "STS16-en-test"
    folder.mkdir(parents=True)
    rng, pairs = np.random.RandomState(3), []
    counts = {"answer-answer": 254, "headlines": 249, "plagiarism": 230, "postediting": 244}
    for part, count in {**counts, "question-question": rows - sum(counts.values())}.items():
        lines, scores = ["w1 w2\tw3\tsource"], [""]
        for _ in range(count):
            a, b = (" ".join(f"w{i}" for i in rng.randint(0, 20, 4)) for _ in range(2))
            score = float(rng.randint(6))
            pairs.append((score, a, b))
            lines.append(f"{a}\t{b}\tsource")
            scores.append(str(score))
        (folder / f"STS.input.{part}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"STS.gs.{part}.txt").write_text("\n".join(scores) + "\n")
    return pairs


def test_all_scored_pairs_of_a_year(tmp_path):
    expected = write_sts16(tmp_path)
    assert read_set(tmp_path, "STS16") == expected


def test_scores_of_other_sentences(tmp_path):
    write_sts16(tmp_path)
    with (tmp_path / "STS16-en-test" / "STS.gs.headlines.txt").open("a") as scores:
        scores.write("1\n")
    message = "STS.input.headlines.txt: 250 lines, STS.gs.headlines.txt 251, which belong together"
    with pytest.raises(DataError, match=message):
        read_set(tmp_path, "STS16")


class TestMeasure:
    @pytest.fixture
    def checkpoint(self, sentence_embedding, tmp_path):
        run = runs.train(
            sentence_embedding, tmp_path / "run", "--pooling", "mean", criterion="nt_xent"
        )
        return run.save_dir / "checkpoint_last.pt"

    def measured(self, data, path, root, *more):
        words = ["--sts", root, "--data", data, "--path", path, *more]
        return sts.main([str(word) for word in words])

    def test_equals_scipy_on_single_sentences(
        self, sentence_embedding, checkpoint, tmp_path, capsys
    ):
        """Without padding and batches; and the average says which sets are missing."""
        pairs = write_sts16(tmp_path / "sts")
        out = tmp_path / "scores.json"
        code = self.measured(sentence_embedding, checkpoint, tmp_path / "sts", "--json", out)
        assert code == 0
        assert "average of 1 sets" in capsys.readouterr().out
        found = json.loads(out.read_text())
        model = load_model(checkpoint, sentence_embedding)
        encode = model.task.encoder.encode

        def embed(text):
            with torch.no_grad():
                return model.model(encode(text, 64)[None], features_only=True)[0][0].mean(dim=0)

        cosines = [float(torch.cosine_similarity(embed(a), embed(b), dim=0)) for _, a, b in pairs]
        expected = 100 * spearmanr(cosines, [score for score, _, _ in pairs])[0]
        assert found["spearman"]["STS16"] == pytest.approx(expected, abs=0.01)
        assert found["pooling"] == "mean"

    @pytest.mark.parametrize(
        "more, message",
        [
            (["--sets", "SICK-R"], "--sets SICK-R: not in --sts {sts}, there are STS16; get SICK"),
            (["--sets", "STS16"], "STS.input.question-question.txt: 208 scored pairs, published"),
            (["--max-length", "99", "--any-rows"], "--max-length 99: the model has 64 positions"),
        ],
    )
    def test_refusals(self, sentence_embedding, checkpoint, tmp_path, capsys, more, message):
        write_sts16(tmp_path / "sts", rows=1185)
        assert self.measured(sentence_embedding, checkpoint, tmp_path / "sts", *more) == 2
        assert message.format(sts=tmp_path / "sts") in capsys.readouterr().err

    def test_no_sets_and_no_pooling(self, sentence_embedding, classification, tmp_path, capsys):
        assert self.measured(sentence_embedding, "none.pt", tmp_path) == 2
        assert "no folder such as STSBenchmark" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            self.measured(sentence_embedding, "none.pt", tmp_path, "--sets", "STS17")
        assert "invalid choice: 'STS17'" in capsys.readouterr().err


SWA = ("--lr-scheduler", "swa_fixed", "--swa-start", "2")


@pytest.mark.parametrize(
    "optimizer, averaged", [("adam", ()), ("delta_sam_adam", ()), ("adam", SWA)]
)
def test_validation_is_scipys_and_keeps_the_best(sentence_embedding, tmp_path, optimizer, averaged):
    """The saved weights, with --lr-scheduler swa_X their average, have the score of the log."""
    best = ["--best-checkpoint-metric", "spearman", "--maximize-best-checkpoint-metric"]
    run = runs.train(
        sentence_embedding,
        tmp_path,
        *("--optimizer", optimizer, "--pooling", "mean_padded", *best, *averaged),
        criterion="nt_xent_r3f",
        validate=True,
    )
    logs = [json.loads(m) for m in run.messages if m[:1] == "{" and '"valid_spearman"' in m]
    state = runs.load(tmp_path / "checkpoint_best.pt")
    scores = [float(log["valid_spearman"]) for log in logs]
    assert float(state["extra_state"]["best"]) == max(scores)
    if averaged:
        average = state["extra_state"][WEIGHT_AVERAGE]
        assert average["n"] > 1
        assert any(not torch.equal(average["raw"][n], w) for n, w in average["averages"].items())
    model = load_model(tmp_path / "checkpoint_best.pt", sentence_embedding)
    rows = [r.split("\t") for r in (sentence_embedding / "valid.tsv").read_text().splitlines()]
    score = model.score([(float(score), a, b) for score, a, b in rows])
    assert score == pytest.approx(max(scores), abs=0.01)
