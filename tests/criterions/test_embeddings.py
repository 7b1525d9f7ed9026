"""Perturbed embeddings reach the output, of every model, and nothing else is perturbed."""

import pytest
import torch

from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.embeddings import WordEmbeddings
from deltasam_fairseq.criterions.task_losses import Classification
from tests.helpers import tiny

HEAD = "sentence_classification_head"
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]
# One embedding for source, target and output: the decoder's own look-ups must not be moved.
SHARED = ["--share-all-embeddings"]
SEQ2SEQ_SIZES = (
    "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2"
).split()
MODELS = {
    "roberta": ("sentence_prediction", []),
    "bart": (
        "sentence_prediction",
        ["--arch", "bart_base", *SEQ2SEQ_SIZES, "--add-prev-output-tokens"]
        + ["--max-source-positions", "64", "--max-target-positions", "64"],
    ),
    "bart seq2seq": ("label_smoothed_cross_entropy", ["--arch", "bart_base", *SEQ2SEQ_SIZES]),
    "transformer": ("label_smoothed_cross_entropy", []),
    "transformer, shared": ("label_smoothed_cross_entropy", SHARED),
}


def model_and_batch(data_of, tmp_path, name):
    criterion, more = MODELS[name]
    argv = tiny.arguments(data_of[criterion], tmp_path, *more, criterion=criterion)
    if "--max-positions" in argv and name == "bart":  # of RoBERTa
        at = argv.index("--max-positions")
        del argv[at : at + 2]
    trainer = tiny.build_trainer([*argv, *NO_DROPOUT], dtype=torch.float64)
    model = trainer.get_model()
    sample = tiny.batches(trainer)[0]
    kwargs = {}
    if criterion == "sentence_prediction":
        kwargs = {"features_only": True, "classification_head_name": HEAD}
    model.train()
    return model, Batch(model, sample, Classification(None), kwargs)


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_noise_moves_the_output(self, data_of, tmp_path, name):
        """Of the size of R3F's, and in proportion: fairseq's own R3F moves RoBERTa's by 0."""
        torch.manual_seed(1)
        _, batch = model_and_batch(data_of, tmp_path, name)
        noise = batch.noise("normal", 1e-5)
        with torch.no_grad():
            clean = batch.scores()
            small, large = batch.scores(noise) - clean, batch.scores(100 * noise) - clean
        assert small.abs().max() > 1e-7
        assert large.abs().max() == pytest.approx(100 * small.abs().max().item(), rel=0.3)

    def test_no_noise_moves_nothing_and_the_hook_goes(self, data_of, tmp_path, name):
        _, batch = model_and_batch(data_of, tmp_path, name)
        clean = batch.scores()
        assert torch.equal(batch.scores(batch.zeros()), clean)
        batch.scores(batch.noise("uniform", 1.0))
        assert torch.equal(batch.scores(), clean)
        assert not batch.embeddings.module._forward_hooks

    def test_noise_spares_padding(self, data_of, tmp_path, name):
        _, batch = model_and_batch(data_of, tmp_path, name)
        padding = ~batch.mask
        assert padding.any()
        for kind in ("uniform", "normal"):
            noise = batch.noise(kind, 1.0)
            assert (noise[padding] == 0).all() and (noise[batch.mask] != 0).all()

    def test_gradient_of_the_noise(self, data_of, tmp_path, name):
        """Against differences in a random direction; parts of the model compute in float32."""
        torch.manual_seed(1)
        _, batch = model_and_batch(data_of, tmp_path, name)
        direction = batch.noise("normal", 1.0)
        delta = batch.zeros().requires_grad_()
        (gradient,) = torch.autograd.grad(batch.inner_scores(delta).square().sum(), delta)
        with torch.no_grad():
            ahead, behind = (
                batch.inner_scores(sign * 1e-5 * direction).square().sum() for sign in (1, -1)
            )
        expected = (ahead - behind) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-2, atol=0)


def test_is_what_extract_features_does(data_of, tmp_path):
    model, batch = model_and_batch(data_of, tmp_path, "roberta")
    noise = batch.noise("uniform", 0.1)
    embedded = batch.embeddings.of(batch.tokens)
    features, _ = model.encoder.extract_features(batch.tokens, token_embeddings=embedded + noise)
    logits = model.classification_heads[HEAD](features)
    assert torch.equal(batch.scores(noise), logits.log_softmax(-1))


def test_sizes_of_the_noise(data_of, tmp_path):
    torch.manual_seed(1)
    _, batch = model_and_batch(data_of, tmp_path, "roberta")
    uniform, normal = (batch.noise(kind, 0.5)[batch.mask] for kind in ("uniform", "normal"))
    assert uniform.abs().max() <= 0.5 and uniform.std().item() == pytest.approx(0.289, rel=0.05)
    assert normal.std().item() == pytest.approx(0.5, rel=0.05)


def test_model_without_word_embeddings():
    class Model(torch.nn.Module):
        encoder = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Model has no encoder with word embeddings.*r_drop"):
        WordEmbeddings(Model())


def test_model_that_looks_up_other_tokens(data_of, tmp_path):
    model, batch = model_and_batch(data_of, tmp_path, "roberta")
    noise = batch.noise("uniform", 0.1)
    with pytest.raises(RuntimeError, match="did not look up its src_tokens"):
        with batch.embeddings.perturbed(batch.tokens, noise):
            model(batch.tokens.clone(), features_only=True)


@pytest.mark.parametrize("dtype, eps, warns", [("bfloat16", 1e-5, True), ("bfloat16", 0.1, False)])
def test_noise_that_half_precision_loses_is_reported_once(
    data_of, tmp_path, monkeypatch, caplog, dtype, eps, warns
):
    monkeypatch.setattr("deltasam_fairseq.criterions.embeddings._checked_dtypes", set())
    model, batch = model_and_batch(data_of, tmp_path, "roberta")
    model.to(getattr(torch, dtype))
    with torch.no_grad():
        model.encoder.sentence_encoder.embed_tokens.weight.mul_(10)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            batch.scores(batch.noise("uniform", eps))
    assert caplog.text.count("survives rounding") == int(warns)
