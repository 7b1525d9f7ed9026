"""The comparison with per-instance perturbation, on a tiny BERT."""

import sys

import pytest
import torch

from deltasam_fairseq.core import Weighting
from scripts.benchmark import per_instance

transformers = pytest.importorskip("transformers", reason="needs Hugging Face's models")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
LABELS = ["x", "y"]
ROWS = [
    {"sentence": " ".join("abcdefgh"[i % 8 :] or "a"), "label": LABELS[i % 3 % 2]}
    for i in range(64)
]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(WORDS))
    return str(tmp_path / "model")


def flat(step):
    return torch.cat([g.flatten() for g in step.gradient])


def test_groups_of_one_are_equation_2_and_one_group_is_sam(folder):
    model = per_instance.Classifier(folder, LABELS)
    model.model.eval()
    rows = ROWS[:6]
    exact = model.groups(rows, 1, 0.1)
    steps, rises = [], []
    for row in rows:  # Eq. 2, by hand
        grads = torch.autograd.grad(model.losses([row]).sum(), model.weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        before = model.losses([row]).item()
        with torch.no_grad():
            for p, g in zip(model.weights, grads):
                p += 0.1 * g / norm
        loss = model.losses([row]).sum()
        rises.append(loss.item() - before)
        steps.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.weights)]))
        with torch.no_grad():
            for p, g in zip(model.weights, grads):
                p -= 0.1 * g / norm
    torch.testing.assert_close(flat(exact), torch.stack(steps).mean(0), rtol=1e-4, atol=1e-6)
    assert exact.rise == pytest.approx(sum(rises) / len(rises), rel=1e-3)
    sam = model.step(rows, 0.1, Weighting(), 0)
    assert torch.equal(flat(model.groups(rows, 6, 0.1)), flat(sam))
    assert not torch.allclose(flat(sam), flat(exact), rtol=1e-2, atol=0)


def test_the_program_writes_tables_and_figures(folder, tmp_path, monkeypatch, capsys):
    lines = ["sentence\tlabel", *(f"{row['sentence']}\t{row['label']}" for row in ROWS)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    words = ["x", folder, str(tmp_path / "train.tsv"), "--out", str(tmp_path / "out")]
    words += ["--rows", "64", "--epochs", "1", "--beta", "3", "--gibbs-lambda", "2", "--rho", "0.1"]
    monkeypatch.setattr(sys, "argv", words)
    per_instance.main()
    table = (tmp_path / "out.md").read_text()
    for name in ("Adam", "SAM", "m-sharpness, M = 4", "delta-SAM, beta 3", "RW-SAM, lambda 2"):
        assert f"| {name} " in table
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 2 * 4 * 6
    monkeypatch.setattr(sys, "argv", [*words[:-8], "--rows", "65"])
    with pytest.raises(SystemExit):
        per_instance.main()
    assert "train.tsv: 65 of 64 rows cannot be kept" in capsys.readouterr().err
