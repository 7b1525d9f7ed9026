"""Option strings of a checkpoint: what eval makes of literals, and nothing else."""

import os

import pytest

from deltasam_fairseq import checkpoints


@pytest.mark.parametrize(
    "value", ["__import__('os').mkdir({!r}) or True", "[None for x in ()] or open({!r}, 'w')"]
)
def test_option_strings_of_a_checkpoint_are_not_run(tmp_path, value):
    """fairseq evals decoder_attention and its like when it builds the model."""
    from fairseq import utils
    from fairseq.models import fconv

    marker = str(tmp_path / "ran")
    for evaluate in (utils.eval_bool, utils.eval_str_list, utils.eval_str_dict, fconv.eval):
        with pytest.raises(ValueError, match="refused to evaluate"):
            evaluate(value.format(marker))
    assert not os.path.exists(marker)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("(0.9, 0.98)", (0.9, 0.98)),
        ("[(512, 10, 5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        (" True", True),
        ("{'a': -1, 'b': None}", {"a": -1, "b": None}),
        ("1-1/4", 0.75),
    ],
)
def test_literal_eval_is_eval_for_options(source, value):
    assert checkpoints.literal_eval(source) == value


def test_literal_eval_keeps_fairseq_defaults():
    from fairseq import utils

    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_str_list("1,2", type=int) == [1, 2]
