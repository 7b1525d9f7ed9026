"""Options that cannot be combined, or mean something only beside another: the two tables."""

import pytest

from deltasam_fairseq.optim.config import CONFLICTS, NEEDS, DeltaSAMConfig, check_optimizer_config
from deltasam_fairseq.optim.parts import parts_of
from deltasam_fairseq.options import UsageError

# A value of every option of the tables, other than its default, and what it needs itself.
GIVEN = {
    "delta_sam_weights": {"delta_sam_weights": "linear", "delta_sam_beta": 3.0},
    "sam_ascent_fraction": {"sam_ascent_fraction": 0.5},
    "delta_sam_lambda": {"delta_sam_lambda": 1.0, "delta_sam_weights": "gibbs"},
    "sam_eta": {"sam_eta": 0.1, "sam_adaptive": True},
    "sam_functional": {"sam_functional": True},
    "sam_gsam_alpha": {"sam_gsam_alpha": 0.4, "delta_sam_beta": 0.0},
    "sam_mask": {"sam_mask": "fisher"},
    "sam_mask_every": {"sam_mask_every": 7, "sam_mask": "fisher"},
    "sam_mask_share": {"sam_mask_share": 0.2, "sam_mask": "fisher"},
    "sam_micro": {"sam_micro": 2, "delta_sam_beta": 0.0},
    "sam_only": {"sam_only": "layer_norm"},
    "sam_adaptive": {"sam_adaptive": True},
    "sam_radius": {"sam_radius": "trust_region"},
    "sam_rho": {"sam_rho": 0.2},
    "sam_rho_schedule": {"sam_rho_schedule": "lr"},
    "sam_trust_sigma": {"sam_trust_sigma": 0.1, "sam_radius": "trust_region"},
    "sam_rho_lr_max": {"sam_rho_lr_max": 0.1, "sam_rho_schedule": "lr"},
    "sam_rho_lr_min": {"sam_rho_lr_min": 0.1, "sam_rho_schedule": "lr"},
    "sam_rho_min": {"sam_rho_min": 0.01, "sam_rho_schedule": "lr"},
    "sam_rho_warmup_updates": {"sam_rho_warmup_updates": 9, "sam_rho_schedule": "warmup"},
    "sam_scope": {"sam_scope": "rank"},
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


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sam_rho_schedule": "warmup"}, "--sam-rho-schedule warmup: give --sam-rho-warmup-up"),
        ({"sam_rho_schedule": "lr", "sam_rho_min": 0.1}, "--sam-rho-min 0.1: must be at most"),
        (
            {"sam_rho_schedule": "lr", "sam_rho_lr_min": 2.0, "sam_rho_lr_max": 1.0},
            "--sam-rho-lr-min 2.0: must be below --sam-rho-lr-max 1",
        ),
    ],
)
def test_schedules_of_rho_are_checked(values, message):
    assert (refused(**values) or "").startswith(message)


@pytest.mark.parametrize("beta", [0.0, 20.0])
def test_beta_is_not_ignored_beside_gibbs(beta):
    found = refused(delta_sam_weights="gibbs", delta_sam_beta=beta)
    assert found is not None and "--delta-sam-lambda scales gibbs" in found


def test_the_schedule_must_be_able_to_move_rho():
    """Without --sam-rho-lr-max the largest rate is that of --lr."""
    cfg = DeltaSAMConfig(sam_rho_schedule="lr", sam_rho_lr_min=1e-3)
    cfg.lr = [1e-5]
    with pytest.raises(UsageError, match="--sam-rho-lr-min 0.001: must be below the largest"):
        parts_of(cfg, lambda: 1e-5)
