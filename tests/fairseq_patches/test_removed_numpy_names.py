"""Every option of masked_lm's and translation's data makes batches that a model trains on."""

import pytest

from tests.helpers import tiny

OPTIONS = {
    "masked_lm": [
        *(f"--sample-break-mode {mode}" for mode in ("none", "complete", "complete_doc", "eos")),
        "--shorten-method truncate",
        "--shorten-method random_crop",
        "--leave-unmasked-prob 0.2 --random-token-prob 0.2 --mask-prob 0.4",
        "--mask-multiple-length 2 --mask-stdev 0.5",
        "--freq-weighted-replacement",
        "--required-seq-len-multiple 8",
    ],
    "cross_entropy": [
        "--num-batch-buckets 2",
        "--left-pad-source --left-pad-target",
        "--truncate-source --max-source-positions 8",
        "--upsample-primary 2",
        "--required-seq-len-multiple 8",
    ],
}


@pytest.mark.parametrize(
    "criterion, options", [(name, option) for name in OPTIONS for option in OPTIONS[name]]
)
def test_data_option_trains(data_of, tmp_path, criterion, options):
    argv = tiny.arguments(data_of[criterion], tmp_path, *options.split(), criterion=criterion)
    trainer = tiny.build_trainer(argv)
    assert trainer.train_step(tiny.batches(trainer)[:1]) is not None
