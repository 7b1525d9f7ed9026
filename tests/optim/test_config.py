"""Options that cannot be combined, or mean something only beside another: the two tables."""

import pytest

from deltasam_fairseq.optim.config import CONFLICTS, NEEDS, DeltaSAMConfig, check_optimizer_config
from deltasam_fairseq.options import UsageError

# A value of every option of the tables, other than its default, and what it needs itself.
GIVEN = {
    "sam_eta": {"sam_eta": 0.1, "sam_adaptive": True},
}


def refused(**values):
    """The error of a configuration, as text; None if it is accepted."""
    try:
        check_optimizer_config(DeltaSAMConfig(**values))
    except UsageError as e:
        return str(e)
    return None


@pytest.mark.parametrize("option", sorted(GIVEN))
def test_each_option_alone_is_accepted(option):
    assert refused(**GIVEN[option]) is None


def test_every_conflict_is_refused_by_both_names():
    for option, other, why in CONFLICTS:
        found = refused(**{**GIVEN[other], **GIVEN[option]})
        flags = [f"--{name.replace('_', '-')}" for name in (option, other)]
        assert found is not None and found.endswith(why), (option, other)
        assert found.startswith(flags[0]) and f"cannot be combined with {flags[1]}" in found


def test_every_need_is_asked_for():
    for option, _, _, remedy in NEEDS:
        found = refused(**{option: GIVEN[option][option]})
        assert found is not None and found.endswith(remedy), option
        assert found.startswith(f"--{option.replace('_', '-')}")
