"""From Hugging Face to sentence embeddings and back: transformers and scipy measure the same."""

import pytest
import torch
from scipy.stats import spearmanr

from deltasam_fairseq.convert.to_fairseq import to_fairseq
from deltasam_fairseq.convert.to_huggingface import to_hf
from deltasam_fairseq.sts import prepare
from deltasam_fairseq.sts.evaluation import load_model
from tests.convert import test_convert as hf
from tests.helpers import runs

WORDS = {"bert": "the cat dog sat naive resume unaffable abc".split(), "roberta": "the cat".split()}


def prepared(folder, family):
    """Sentences of the family's words, prepared with a model converted from transformers."""
    if family == "bert":
        hf.save_bert(hf.bert("BertForMaskedLM", max_position_embeddings=70), folder / "hf")
        files = ["--bpe", "wordpiece", "--wordpiece-vocab", folder / "fs" / "vocab.txt"]
    else:
        model = hf.roberta("RobertaForMaskedLM", max_position_embeddings=72)
        for weight in model.parameters():  # the sum of position and type is exact in float32
            weight.data = (1024 * weight.data).round() / 1024
        hf.save_roberta(model, folder / "hf")
        files = ["--gpt2-encoder-json", folder / "fs" / "encoder.json"]
        files += ["--gpt2-vocab-bpe", folder / "fs" / "vocab.bpe"]
    to_fairseq(folder / "hf", folder / "fs")
    words, draw = WORDS[family], torch.Generator().manual_seed(1)

    def sentence():
        return " ".join(words[i] for i in torch.randint(len(words), (12,), generator=draw))

    (folder / "sentences.txt").write_text("".join(f"{sentence()}\n" for _ in range(16)))
    pairs = [(float(i), sentence(), sentence()) for i in range(12)]
    (folder / "pairs.tsv").write_text("".join(f"{s}\t{a}\t{b}\n" for s, a, b in pairs))
    command = ["--train", folder / "sentences.txt", "--valid", folder / "pairs.tsv"]
    command += ["--dict", folder / "fs" / "dict.txt", "--out", folder / "data", *files]
    assert prepare.main([str(word) for word in command]) == 0
    return pairs


def in_float64(model):
    """A SentenceModel of ours; fairseq's gelu computes in float32 whatever it is given."""
    for layer in model.model.double().encoder.sentence_encoder.layers:
        layer.activation_fn = torch.nn.functional.gelu
    return model


@torch.no_grad()
def embeddings(folder, sentences, pooling):
    """Those of transformers' own model and tokenizer in float64, one sentence at a time."""
    tokenizer = hf.transformers.AutoTokenizer.from_pretrained(folder)
    model = hf.transformers.AutoModel.from_pretrained(folder).eval().double()
    rows = []
    for text in sentences:
        padding = "max_length" if pooling == "mean_padded" else False
        batch = tokenizer(
            text, max_length=64, truncation=True, padding=padding, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "family, pooling",
    [("bert", "mean"), ("bert", "mean_padded"), ("roberta", "cls"), ("roberta", "mean_padded")],
)
def test_trained_checkpoint_in_transformers(tmp_path, family, pooling):
    """Embeddings of the same weights in float64: before training, and after it and the export."""
    pairs = prepared(tmp_path, family)
    arch = {"bert": "bert", "roberta": "roberta_base"}[family]
    options = ["--arch", arch, "--max-positions", "70", "--pooling", pooling]
    options += ["--finetune-from-model", str(tmp_path / "fs" / "model.pt"), "--max-update", "2"]
    run = runs.train(tmp_path / "data", tmp_path / "run", *options, criterion="nt_xent")
    checkpoint = run.save_dir / "checkpoint_last.pt"
    to_hf(checkpoint, tmp_path / "data", tmp_path / "back", tmp_path / "hf")
    scores, first, second = zip(*pairs)
    cases = [(tmp_path / "fs" / "model.pt", "hf"), (checkpoint, "back")]
    for path, folder in cases:
        model = in_float64(load_model(path, tmp_path / "data", pooling))
        theirs = [embeddings(tmp_path / folder, side, pooling) for side in (first, second)]
        for side, expected in zip((first, second), theirs):
            torch.testing.assert_close(model.embed(side), expected, rtol=0, atol=1e-10)
    before = embeddings(tmp_path / "hf", first, pooling)
    assert (before - theirs[0]).abs().max() > 1e-3  # the model was trained
    name = "encoder.sentence_encoder.embed_positions.weight"
    of_padding = [runs.load(path)["model"][name][1] for path, _ in cases]
    assert torch.equal(*of_padding)  # as transformers, which does not train it
    cosines = torch.cosine_similarity(*theirs).tolist()
    expected = 100 * spearmanr(cosines, scores)[0]
    found = load_model(checkpoint, tmp_path / "data").score(pairs)
    assert found == pytest.approx(expected, abs=0.01)
