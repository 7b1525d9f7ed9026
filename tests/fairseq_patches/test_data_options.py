"""Every option of the data of masked_lm, language_modeling and translation makes batches that a
model trains on."""

import numpy as np
import pytest
import torch
from fairseq.data import indexed_dataset

from tests.helpers import runs, tiny

BREAKS = [f"--sample-break-mode {mode}" for mode in ("none", "complete", "complete_doc", "eos")]
SHORTEN = [
    "--shorten-method truncate --shorten-data-split-list train",
    "--shorten-method random_crop",
]
OPTIONS = {
    "masked_lm": [
        *BREAKS,
        *SHORTEN,
        "--mask-whole-words",
        "--mask-whole-words --mask-multiple-length 2",
        "--leave-unmasked-prob 0.2 --random-token-prob 0.2 --mask-prob 0.4",
        "--mask-multiple-length 2 --mask-stdev 0.5",
        "--freq-weighted-replacement",
        "--skip-masking",
        "--include-target-tokens",
        "--include-index",
        "--required-seq-len-multiple 8",
    ],
    "language_modeling": [
        *BREAKS,
        *SHORTEN,
        "--add-bos-token",
        "--pad-to-fixed-length",
        "--pad-to-fixed-length --pad-to-fixed-bsz",
        "--output-dictionary-size 10",
        "--future-target",
    ],
    "translation": [
        "--num-batch-buckets 2 --max-tokens 64",
        "--left-pad-source --left-pad-target",
        "--truncate-source --max-source-positions 8",
        "--max-source-positions 12 --max-target-positions 12 --skip-invalid-size-inputs-valid-test",
        "--upsample-primary 2",
        "--load-alignments",
        "--required-seq-len-multiple 8",
    ],
}
LANGUAGE_MODEL = (
    "--task language_modeling --arch transformer_lm --decoder-embed-dim 16 --decoder-layers 1 "
    "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample 24"
).split()


def write_alignments(data):
    """Of every word with the word of the target that it is, which is reversed."""
    for split, n, seed in (("train", 32, 1), ("valid", 16, 2)):
        path = f"{data / split}.align.aa-bb"
        builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
        for row in tiny.sentences(n, seed):
            pairs = [x for i in range(len(row)) for x in (i, len(row) - 1 - i)]
            builder.add_item(torch.tensor(pairs, dtype=torch.int32))
        builder.finalize(f"{path}.idx")


@pytest.mark.parametrize(
    "task, options", [(name, option) for name in OPTIONS for option in OPTIONS[name]]
)
def test_data_option_trains(language_modelling, translation, tmp_path, monkeypatch, task, options):
    """Two updates and a validation, with fairseq's own batches."""
    more, criterion, data = options.split(), "masked_lm", language_modelling
    if "--mask-whole-words" in more:
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w0"]
        (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
        more += ["--bpe", "wordpiece", "--wordpiece-vocab", str(tmp_path / "vocab.txt")]
    if task == "translation":
        data, criterion = translation, "cross_entropy"
        write_alignments(data)
    if task == "language_modeling":
        criterion = "cross_entropy"
        monkeypatch.setattr(tiny, "arguments", language_model_arguments)
    more += ["--optimizer", "delta_sam_adam", "--required-batch-size-multiple", "1", "--no-save"]
    run = runs.train(data, tmp_path, *more, "--max-update", "2", criterion=criterion, validate=True)
    assert len(run.updates) == 2 and any("valid_loss" in message for message in run.messages)


def language_model_arguments(data, save_dir, *more, criterion):
    """Those of `tiny.arguments` without its task and model."""
    argv = ARGUMENTS(data, save_dir, criterion=criterion)
    return [argv[0], *LANGUAGE_MODEL, *argv[argv.index("--criterion") :], *more]


ARGUMENTS = tiny.arguments


def test_whole_words_need_a_bpe(language_modelling, tmp_path, capsys):
    """fairseq masks single tokens then, without a word."""
    with pytest.raises(SystemExit):
        runs.train(language_modelling, tmp_path, "--mask-whole-words", criterion="masked_lm")
    assert "--mask-whole-words: no --bpe" in capsys.readouterr().err
