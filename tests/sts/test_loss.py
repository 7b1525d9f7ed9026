"""NT-Xent and its R3F: by hand, against a plain twin, over ranks; the views of a sentence."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.sts.embeddings import pool
from deltasam_fairseq.sts.nt_xent import NTXent
from deltasam_fairseq.sts.task import SentenceEmbeddingConfig, Views
from deltasam_fairseq.sts.views import SentenceEncoder, split_at_span
from tests.helpers import runs, tiny
from tests.helpers.processes import run_ranks


def losses_of(embeddings, tau=0.5):
    objective = NTXent(torch.ones(len(embeddings), 1).bool(), "cls", tau, local=False)
    return objective.losses(objective.scores(embeddings.unsqueeze(1)))


def naive(embeddings, tau):
    """The equation of nt_xent.py, a loop over a and b."""
    n = len(embeddings) // 2
    e = [x / x.norm() for x in embeddings.double()]
    c = []
    for a in range(2 * n):
        other = (a + n) % (2 * n)
        positive = torch.exp(e[a] @ e[other] / tau)
        negatives = [torch.exp(e[a] @ e[b] / tau) for b in range(2 * n) if b not in (a, other)]
        c.append(-torch.log(positive / (positive + sum(negatives))))
    return torch.stack([(c[j] + c[j + n]) / 2 for j in range(n)])


def test_by_hand():
    """Sentences at right angles, both views the same: one cosine of 1 and two of 0 at tau 1/2."""
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    torch.testing.assert_close(losses_of(embeddings), torch.full((2,), expected))


def test_equals_the_naive_loop():
    torch.manual_seed(1)
    embeddings = torch.randn(10, 6, dtype=torch.float64)
    torch.testing.assert_close(losses_of(embeddings, 0.04), naive(embeddings, 0.04))


def test_one_sentence_has_no_loss():
    assert losses_of(torch.randn(2, 4)).tolist() == [0.0]


def test_divergence_of_r3f_is_over_all_but_the_view_itself():
    torch.manual_seed(1)
    objective = NTXent(torch.ones(6, 1).bool(), "cls", 0.5, local=False)
    some, others = (objective.scores(torch.randn(6, 1, 4).double()) for _ in range(2))
    p, q = (
        torch.stack([row[[b for b in range(6) if b != a]] for a, row in enumerate(scores)])
        for scores in (some, others)
    )
    torch.testing.assert_close(p.exp().sum(dim=1), torch.ones(6).double())
    both = ((p.exp() - q.exp()) * (p - q)).sum(dim=1)
    torch.testing.assert_close(objective.divergence(some, others), (both[:3] + both[3:]) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_the_features_alone(dtype):
    """--amp: cosines and losses of the model's rounded output are float32's, gradients too."""
    torch.manual_seed(1)
    features, found = torch.randn(6, 8), []
    for enabled in (False, True):
        leaf = features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            losses = losses_of(leaf.to(dtype), 0.04)
        losses.sum().backward()
        found.append((losses, leaf.grad))
    assert found[1][0].dtype == torch.float32
    assert all(map(torch.equal, *found))


def test_pooling():
    features = torch.tensor([[[1.0], [3.0], [8.0]]])
    mask = torch.tensor([[True, True, False]])
    found = [pool(features, mask, how).item() for how in ("cls", "mean", "mean_padded")]
    assert found == [1.0, 2.0, 4.0]


def test_span():
    """The text of the span goes where it occurs first; starts are those before len - 5."""
    text = "abcdefghijklmnopqrstuvwxyz0123"
    starts = {len(split_at_span(text, 5, np.random.default_rng(seed))[0]) for seed in range(400)}
    assert starts == set(range(25))
    left, right = split_at_span("ab" * 20, 5, np.random.default_rng(1))
    assert left in ("", "a") and len(left + right) == 35
    assert split_at_span(text[:29], 5, np.random.default_rng(1)) is None
    assert split_at_span(text, 0, np.random.default_rng(1)) is None


def trainer_of(data, folder, *more, criterion="nt_xent"):
    return tiny.build_trainer(tiny.arguments(data, folder, *more, criterion=criterion))


def epoch_of(data, folder, *more, epoch=1):
    """src_tokens of all batches of an epoch."""
    trainer = trainer_of(data, folder, *more)
    batches = trainer.get_train_iterator(epoch, load_dataset=False).next_epoch_itr(shuffle=True)
    return [batch["net_input"]["src_tokens"] for batch in batches]


def test_views_depend_on_seed_epoch_and_sentence_alone(sentence_embedding, tmp_path):
    first = epoch_of(sentence_embedding, tmp_path, epoch=2)
    workers = epoch_of(sentence_embedding, tmp_path, "--num-workers", "2", epoch=2)
    assert len(first) == 4 and all(map(torch.equal, first, workers))
    dataset = trainer_of(sentence_embedding, tmp_path).task.dataset("train")
    pairs = [dataset.views(i) for i in range(len(dataset))]
    assert sum(not torch.equal(a, b) for a, b in pairs) > len(pairs) / 2
    assert all(torch.equal(b, dataset.views(i)[1]) for i, (_, b) in enumerate(pairs))
    dataset.set_epoch(2)
    again = [dataset.views(i) for i in range(len(dataset))]
    assert all(torch.equal(a, other) for (a, _), (other, _) in zip(pairs, again))
    assert any(not torch.equal(b, other) for (_, b), (_, other) in zip(pairs, again))


def test_epochs_have_batches_of_their_own(sentence_embedding, tmp_path):
    """With numpy seeded alike, as fairseq 0.12.2 does; a task made again has the same order."""
    orders = []
    for seed in ("1", "1", "2"):
        dataset = trainer_of(sentence_embedding, tmp_path, "--seed", seed).task.dataset("train")
        for epoch in (1, 2):
            dataset.set_epoch(epoch)
            np.random.seed(5)
            orders.append(dataset.ordered_indices().tolist())
    assert orders[:2] == orders[2:4]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(32)) for order in orders)


def test_mask_token_and_literal_text(sentence_embedding, tmp_path):
    """BERT's text [MASK] is its mask token; other models read it as words."""
    own, literal = (
        trainer_of(sentence_embedding, tmp_path, *more).task.dataset("train")
        for more in ((), ("--literal-mask",))
    )
    mask = trainer_of(sentence_embedding, tmp_path).task.dictionary.index("<mask>")
    masked = [i for i in range(len(own)) if mask in own.views(i)[1]]
    assert masked
    assert all(torch.equal(own.views(i)[1], literal.views(i)[1]) for i in masked)


def test_literal_text_is_words_where_it_is_not_the_mask_token():
    """As RoBERTa's BPE reads it; here a BPE that splits at spaces."""
    words = Dictionary()
    for word in ("a" * 30, "[MASK]", "<mask>"):
        words.add_symbol(word)
    encoder = SentenceEncoder(lambda text: " ".join(text.split()), words)
    for literal, word in ((True, "[MASK]"), (False, "<mask>")):
        cfg = SentenceEmbeddingConfig(max_length=50, span_mask=5, literal_mask=literal, seed=1)
        views = Views(["a" * 30], encoder, cfg, words, 0).views(0)
        assert [words.index(word) in view for view in views] == [False, True]


@pytest.mark.parametrize("criterion", tiny.CONTRASTIVE)
@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
def test_resumed_is_uninterrupted(sentence_embedding, tmp_path, criterion, optimizer):
    """Four updates are an epoch; the stop is in the middle of the second."""
    options = ["--optimizer", optimizer]
    options += ["--eps", "0.1"] if criterion == "nt_xent_r3f" else []
    whole, stopped, parts = (
        runs.train(
            sentence_embedding, tmp_path / name, *options, "--max-update", n, criterion=criterion
        )
        for name, n in (("whole", "7"), ("parts", "6"), ("parts", "7"))
    )
    runs.assert_same_end(parts, whole)


def test_two_ranks_are_one_batch(sentence_embedding, tmp_path):
    """Losses and weights of two ranks with 8 sentences are those of one with 16, in float64.

    SGD, whose step is the gradient: Adam's from one near zero magnifies rounding.
    """
    order = list(range(16)), list(range(16, 32))
    updates = {
        "one": [[[batch]] for batch in order],
        "two": [[[batch[:8]], [batch[8:]]] for batch in order],
    }
    cases = {}
    for criterion, backend, layout in itertools.product(
        tiny.CONTRASTIVE, ("legacy_ddp", "pytorch_ddp"), updates
    ):
        argv = tiny.arguments(
            sentence_embedding,
            tmp_path,
            *("--optimizer", "delta_sam_sgd", "--lr", "0.1", "--ddp-backend", backend),
            *("--dropout", "0", "--attention-dropout", "0", "--find-unused-parameters"),
            *("--pooling", "mean"),
            *(("--eps", "0.1") if criterion == "nt_xent_r3f" else ()),
            criterion=criterion,
        )
        same = {"updates": updates[layout], "dtype": "float64", "same_noise": True}
        cases[f"{criterion} {backend} {layout}"] = {"argv": argv, **same}
    found = run_ranks(tmp_path, cases)
    for name in (name for name in cases if name.endswith("two")):
        two, (one,) = found[name], found[name.replace("two", "one")]
        assert torch.equal(two[0]["parameters"], two[1]["parameters"])
        torch.testing.assert_close(two[0]["parameters"], one["parameters"], rtol=0, atol=1e-9)
        for log, other in zip(one["logs"], two[0]["logs"]):
            assert log["loss"] == pytest.approx(other["loss"], abs=2e-3)


def test_two_ranks_validate_as_one(sentence_embedding, tmp_path):
    """12 pairs in batches of 5: 3, so that the second rank ends with a dummy, one of training."""
    found = []
    for ranks in (1, 2):
        argv = tiny.arguments(
            sentence_embedding,
            tmp_path / str(ranks),
            *("--lr", "0", "--max-update", "1", "--batch-size-valid", "5", "--dropout", "0"),
            *("--distributed-world-size", str(ranks), "--no-save", "--data-buffer-size=0"),
            *("--find-unused-parameters", "--best-checkpoint-metric", "spearman"),
            criterion="nt_xent",
        )
        lines = [x for x in tiny.train(argv).stdout.splitlines() if '"valid_spearman"' in x]
        found.append([json.loads(x[x.index("{") :]) for x in lines])
    (one,), (two,) = found
    for key in ("valid_spearman", "valid_loss"):
        assert float(two[key]) == pytest.approx(float(one[key]), abs=0.01)


def test_ranks_train_on_the_batches_of_one(sentence_embedding, tmp_path):
    """Rank 0 and 1 of two with 4 sentences, update for update, beside one with 8."""
    task = trainer_of(sentence_embedding, tmp_path).task
    dataset = task.dataset("train")

    def ids(size, ranks):
        shards = []
        for rank in range(ranks):
            iterator = task.get_batch_iterator(
                dataset, max_sentences=size, seed=3, num_shards=ranks, shard_id=rank
            )
            shards.append([b["id"].tolist() for b in iterator.next_epoch_itr(shuffle=True)])
        return [sorted(sum(update, [])) for update in zip(*shards)]

    assert ids(4, 2) == ids(8, 1)


class TestRefusals:
    @pytest.mark.parametrize(
        "options, message",
        [
            (["--batch-size", "33"], "--batch-size 33: of each of 1 ranks, there are 32 sentences"),
            (["--batch-size", "1"], "--batch-size 1: NT-Xent needs other sentences"),
            (["--max-tokens", "99"], "--max-tokens 99: the number of negatives"),
        ],
    )
    def test_batches(self, sentence_embedding, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            epoch_of(sentence_embedding, tmp_path, *options)

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--max-length", "100"], "--max-length 100: sentences have up to 100 tokens"),
            (["--max-positions", "40"], "--max-length 50: sentences have up to 50 tokens"),
            (["--span-mask", "-1"], "--span-mask -1: must be at least 0"),
        ],
    )
    def test_options_of_the_task(self, sentence_embedding, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            trainer_of(sentence_embedding, tmp_path, *options)

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--sam-ascent-fraction", "0.5"], "--sam-ascent-fraction 0.5: --criterion nt_xent: "),
            (["--sam-scope", "rank"], "--sam-scope rank: --criterion nt_xent: the loss of a"),
            (
                ["--optimizer", "sam_adam", "--sam-micro", "2"],
                "--sam-micro 2 cannot be combined with --criterion nt_xent: the loss of a sentence",
            ),
            (["--temperature", "0"], "--temperature 0.0: must be finite and above 0"),
        ],
    )
    def test_options_of_the_criterion(self, sentence_embedding, tmp_path, capsys, options, message):
        more = ["--optimizer", "delta_sam_adam", *options]
        with pytest.raises(SystemExit):
            runs.parse(tiny.arguments(sentence_embedding, tmp_path, *more, criterion="nt_xent"))
        assert message in capsys.readouterr().err

    def test_other_task(self, span_prediction, tmp_path, capsys):
        more = ["--criterion", "nt_xent"]
        with pytest.raises(SystemExit):
            runs.parse(
                tiny.arguments(span_prediction, tmp_path, *more, criterion="span_prediction")
            )
        message = "--criterion nt_xent cannot be combined with --task span_prediction"
        assert message in capsys.readouterr().err


def test_no_such_split(sentence_embedding, tmp_path):
    task = trainer_of(sentence_embedding, tmp_path).task
    with pytest.raises(
        FileNotFoundError, match="no split test; .* --valid FILE makes the split valid"
    ):
        task.load_dataset("test")


def test_duplicates_are_said(sentence_embedding, tmp_path, caplog):
    data = tiny.write_sentences(tmp_path / "data")
    text = (data / "train.txt").read_text()
    (data / "train.txt").write_text(text + text.splitlines()[0] + "\n")
    trainer_of(data, tmp_path)
    assert "1 of 33 sentences repeat an earlier one" in caplog.text


def test_scores_keep_their_precision_in_half_precision(tmp_path):
    """0.6534 and 0.6535 are one number in float16; a tie that is none would move Spearman."""
    data = tiny.write_sentences(tmp_path / "data")
    (data / "valid.tsv").write_text("0.6534\tw1\tw2\n0.6535\tw1\tw3\n1\tw2\tw3\n")
    trainer = trainer_of(data, tmp_path, "--memory-efficient-fp16")
    trainer.task.load_dataset("valid")
    pairs = trainer.task.dataset("valid")
    sample, _ = trainer._prepare_sample(pairs.collater([pairs[i] for i in range(3)]))
    assert sample["target"][0] == sample["target"][1]
    criterion, model = trainer.get_criterion(), trainer.get_model().eval()
    assert criterion(model, sample)[2]["gold"] == [0.6534, 0.6535, 1.0]


def test_per_sentence_losses_add_up(sentence_embedding, tmp_path):
    trainer = trainer_of(sentence_embedding, tmp_path)
    sample = tiny.batches(trainer)[0]
    losses = per_sentence_losses(trainer.get_criterion(), trainer.get_model(), sample).losses
    assert losses.shape == (8,) and (losses > 0).all()
