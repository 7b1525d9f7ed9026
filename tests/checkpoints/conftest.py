"""A checkpoint that fairseq-train wrote, and both ways of reading it."""

import random

import pytest
import torch

from deltasam_fairseq import checkpoints
from deltasam_fairseq.checkpoints import reading
from tests.checkpoints.saved import TRAIN, argv


@pytest.fixture(autouse=True)
def _installed():
    checkpoints.install()


@pytest.fixture(params=["torch", "restricted"])
def mode(request, monkeypatch):
    """Both readers, torch's own and the one for torch < 2.6."""
    if request.param == "torch" and not reading.HAS_SAFE_GLOBALS:
        pytest.skip("torch < 2.6")
    monkeypatch.setattr(reading, "HAS_SAFE_GLOBALS", request.param == "torch")
    return request.param


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A classification data set and a checkpoint that fairseq-train made of it."""
    from fairseq_cli import preprocess, train

    checkpoints.install()
    root = tmp_path_factory.mktemp("trained")
    rng = random.Random(0)
    for split in ("train", "valid"):
        lines = [" ".join(rng.choices("abcdefgh", k=5)) for _ in range(16)]
        (root / f"{split}.input0").write_text("\n".join(lines) + "\n")
        (root / f"{split}.label").write_text("".join(f"{i % 2}\n" for i in range(16)))
    for part in ("input0", "label"):
        prefs = ["--trainpref", root / f"train.{part}", "--validpref", root / f"valid.{part}"]
        with argv("--only-source", *prefs, "--destdir", root / "bin" / part, "--workers", 1):
            preprocess.cli_main()
    with argv(root / "bin", *TRAIN, "--save-dir", root / "ckpt", "--max-update", 4):
        train.cli_main()
    return root


@pytest.fixture(scope="session")
def state(trained):
    return torch.load(trained / "ckpt" / "checkpoint_last.pt", weights_only=False)
