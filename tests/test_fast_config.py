"""The configurations that tests compose in a short way are fairseq's own."""

import pytest
from fairseq import options
from fairseq.dataclass import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from tests.helpers import fast_config, tiny

CRITERIONS = ["sentence_prediction", "r3f", "masked_lm", "seq2seq_distill", "span_prediction"]
MORE = {
    "adam": ["--lr-scheduler", "swa_fixed", "--swa-start", "1", "--adam-betas", "(0.9, 0.98)"],
    "delta_sam_adam": ["--update-freq", "1,2", "--sam-only", "layer_norm|a=b", "--fp16"],
    "sam_sgd": ["--clip-norm", "0.5", "--save-dir", "with 'signs' of, hydra's {grammar}"],
}


@pytest.mark.parametrize("criterion", CRITERIONS)
@pytest.mark.parametrize("optimizer", MORE)
def test_as_hydra_composes_it(data_of, tmp_path, monkeypatch, criterion, optimizer):
    data = data_of[criterion]
    more = ["--optimizer", optimizer, *MORE[optimizer]]
    argv = tiny.arguments(data, tmp_path, *more, criterion=criterion)
    args = options.parse_args_and_arch(options.get_training_parser(), argv)
    short = convert_namespace_to_omegaconf(args)
    again = convert_namespace_to_omegaconf(args)
    monkeypatch.setattr(utils, "compose", fast_config.compose_by_hydra)
    by_hydra = convert_namespace_to_omegaconf(args)
    assert short == again == by_hydra
    assert str(short) == str(by_hydra)  # types and order too
