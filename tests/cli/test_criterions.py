"""The criterions from fairseq-train's command line: errors, help, resuming, half precision."""

import pytest
import torch

from deltasam_fairseq.config_checks import check_config
from deltasam_fairseq.trainer.checkpoint_state import CRITERION
from tests.cli.test_errors import data_must_not_load, error_of  # noqa: F401
from tests.cli.test_help import help_of
from tests.cli.test_resume import assert_resumed_with_validation
from tests.helpers import runs, tiny

# criterion, options; what the message must name
ERRORS = {
    "negative lambda": ("r3f", "--r3f-lambda -1", ["--r3f-lambda -1", "at least 0", "0.1, 0.5"]),
    "noise nan": ("r3f", "--eps nan", ["--eps nan", "finite", "1e-5"]),
    "noise type": ("r3f", "--noise-type gamma", ["--noise-type", "gamma", "uniform"]),
    "negative alpha": ("r_drop", "--r-drop-alpha -1", ["--r-drop-alpha -1", "at least 0"]),
    "negative steps": ("freelb", "--adv-steps -1", ["--adv-steps -1", "at least 0"]),
    "negative ball": ("freelb", "--adv-max-norm -1", ["--adv-max-norm -1", "at least 0"]),
    "norm": ("freelb", "--adv-norm l1", ["--adv-norm", "l1", "l2", "linf"]),
    "no ball": ("smart", "--smart-eps 0", ["--smart-eps 0", "above 0"]),
    "momentum": ("smart", "--smart-momentum 2", ["--smart-momentum 2", "at most 1"]),
    "a share of what is not set": (
        "smart",
        "--max-update 0",
        ["--smart-switch 0.1", "--max-update", "number of updates"],
    ),
    "no steps": ("vat", "--vat-steps 0", ["--vat-steps 0", "at least 1"]),
    "metric of classes": (
        "r3f",
        "--regression-target --report-mcc",
        ["--report-mcc", "--regression-target", "--report-pearson-and-spearman"],
    ),
    "metric of numbers": (
        "r3f",
        "--report-pearson-and-spearman",
        ["--report-pearson-and-spearman", "--regression-target", "--report-mcc"],
    ),
    "layer drop": (
        "r_drop",
        "--encoder-layerdrop 0.1 --ddp-backend pytorch_ddp --distributed-world-size 2",
        ["--encoder-layerdrop", "--criterion r_drop", "legacy_ddp"],
    ),
    "sharded": (
        "freelb",
        "--ddp-backend fully_sharded",
        ["--ddp-backend fully_sharded", "--criterion freelb", "legacy_ddp"],
    ),
    "no teacher": (
        "plain",
        "--criterion distill",
        ["--distill-lambda 0.5", "--distill-teacher", "--distill-lambda 0"],
    ),
    "teacher that is not there": (
        "distill",
        "--distill-teacher /no/such.pt",
        ["--distill-teacher /no/such.pt", "does not exist", "full one"],
    ),
    "temperature": ("distill", "--distill-temperature 1e4", ["temperature 1", "at most 1000"]),
    "no temperature": ("distill", "--distill-temperature 0", ["temperature 0", "above 0"]),
    "more than all": ("distill", "--distill-lambda 1.5", ["--distill-lambda 1.5", "at most 1"]),
    "negative share": ("distill", "--distill-lambda -1", ["--distill-lambda -1", "at least 0"]),
    "teacher of tokens that is not there": (
        "seq2seq_distill",
        "--distill-teacher /no/such.pt",
        ["--distill-teacher /no/such.pt", "does not exist"],
    ),
    "seq2seq": ("seq2seq_r3f", "--eps -1", ["--eps -1", "at least 0"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_option(tmp_path, monkeypatch, capfd, data_must_not_load, name):  # noqa: F811
    criterion, options, expected = ERRORS[name]
    argv = tiny.arguments(tmp_path, tmp_path, *options.split(), criterion=criterion)
    message = error_of(argv, monkeypatch, capfd)
    for part in expected:
        assert part in message


def test_activation_checkpointing(tmp_path):
    argv = tiny.arguments(tmp_path, tmp_path, criterion="freelb")
    cfg = runs.parse(argv)
    cfg.model.checkpoint_activations = True
    with pytest.raises(ValueError, match="--checkpoint-activations.*--criterion freelb.*r_drop"):
        check_config(cfg)
    cfg.criterion._name = "r3f"


def test_labels_and_classes_are_compared_before_data_is_loaded(classification, tmp_path, capsys):
    argv = tiny.arguments(classification, tmp_path, "--num-classes", "1", criterion="r3f")
    with pytest.raises(SystemExit):
        tiny.build_trainer(argv)
    assert "--num-classes 1: the data has 2 labels (0, 1)" in capsys.readouterr().err


def test_a_task_without_labels(language_modelling, tmp_path):
    argv = tiny.arguments(language_modelling, tmp_path, criterion="masked_lm")
    with pytest.raises(ValueError, match="MaskedLMTask.*--task sentence_prediction"):
        tiny.build_trainer([*argv, "--criterion", "r3f", "--report-mcc"])


@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
@pytest.mark.parametrize("criterion", ["sentence_prediction", "plain", "freelb"])
def test_overflow_is_skipped_whoever_steps(classification, tmp_path, criterion, optimizer):
    """Also by plain Adam, and before SAM begins; the loss scale falls, the weights stay."""
    argv = tiny.arguments(classification, tmp_path, "--memory-efficient-fp16", criterion=criterion)
    argv += ["--optimizer", optimizer, "--fp16-init-scale", str(2**40)]
    argv += ["--sam-start-update", "3"] if optimizer != "adam" else []
    trainer = tiny.build_trainer(argv)
    before = tiny.weights(trainer)
    assert trainer.train_step(tiny.batches(trainer)[:1]) is None
    assert all(torch.equal(a, b) for a, b in zip(tiny.weights(trainer), before))
    assert trainer.optimizer.scaler.loss_scale == 2**39


def test_smart_without_its_average_drops_an_old_one(classification, tmp_path):
    options = ["--smart-switch", "9", "--max-update"]
    runs.train(classification, tmp_path, *options, "2", criterion="smart")
    end = runs.train(classification, tmp_path, *options, "4", "--smart-mu", "0", criterion="smart")
    assert end.checkpoint["extra_state"][CRITERION] == {}


@pytest.mark.parametrize(
    "criterion, shown",
    [
        ("r3f", ["--r3f-lambda", "--eps", "--noise-type", "--same-dropout", "--report-mcc"]),
        ("r_drop", ["--r-drop-alpha", "--regression-target"]),
        ("freelb", ["--adv-lr", "--adv-steps", "--adv-init-mag", "--adv-max-norm", "--adv-norm"]),
        ("smart", ["--smart-lambda", "--smart-mu", "--smart-momentum", "--smart-switch"]),
        ("vat", ["--vat-eps", "--vat-xi", "--vat-alpha", "--vat-steps"]),
        ("distill", [f"--distill-{name}" for name in "teacher teacher-head lambda".split()]),
        ("seq2seq_distill", ["--distill-temperature", "--label-smoothing"]),
        ("seq2seq_r3f", ["--r3f-lambda", "--label-smoothing"]),
        ("seq2seq_r_drop", ["--r-drop-alpha", "--label-smoothing"]),
    ],
)
def test_help(capsys, criterion, shown):
    text = help_of(capsys, "--criterion", criterion)
    found = {word.rstrip(",") for word in text.split() if word.startswith("--")}
    assert set(shown) <= found
    assert "Paper" in text or "GLUE" in text or criterion.endswith("distill")


RESUMED = {
    "r3f": [],
    "r3f, spectral norm": ["--spectral-norm-classification-head"],
    "r_drop": [],
    "freelb": [],
    "smart": ["--smart-momentum", "0.5", "--smart-late-momentum", "0.9"],
    "vat": [],
    "distill": [],
    "smart, bfloat16": ["--bf16", "--smart-momentum", "0.5"],
    "freelb, float16": ["--memory-efficient-fp16"],
}


@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed(classification_and_teacher, tmp_path, name, optimizer):
    """R4F: fairseq alone cannot load a spectrally normalised head. SMART: the averaged weights
    are those of the run that never stopped, in bfloat16 kept in float32."""
    criterion = name.split(",")[0]
    if optimizer == "adam" and "bfloat16" in name:
        pytest.skip("fairseq does not save the float32 masters of plain Adam; SAM's optimizers do")
    options = ["--optimizer", optimizer, *RESUMED[name]]

    def train(folder, updates):
        # what --smart-switch is a share of is the same in the part as in the whole
        more = [*options, "--max-update", updates]
        if criterion == "smart":
            more += ["--smart-switch", "4"]
        return runs.train(classification_and_teacher, tmp_path / folder, *more, criterion=criterion)

    whole = train("whole", "7")
    train("parts", "3")
    parts = train("parts", "7")
    assert [log["num_updates"] for log in parts.updates] == ["4", "5", "6", "7"]
    runs.assert_same_end(parts, whole)
    if criterion == "smart":
        averages = [r.checkpoint["extra_state"][CRITERION] for r in (parts, whole)]
        runs.assert_same(*averages)
        assert {a.dtype for a in averages[0]["averages"].values()} == {torch.float32}


@pytest.mark.parametrize("criterion", ["plain", "r3f"])
def test_resumed_after_a_validation(classification, tmp_path, criterion):
    assert_resumed_with_validation(
        *(classification, tmp_path, "--optimizer", "delta_sam_adam", "--lr", "0.02"),
        *("--report-mcc", "--report-acc-and-f1"),
        criterion=criterion,
        metric="valid_mcc",
    )


@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
def test_distilling_nothing_is_the_plain_criterion(classification_and_teacher, tmp_path, optimizer):
    """A whole run, bit for bit, and without reading the teacher; with a share it goes elsewhere."""
    ends = [
        runs.train(
            *(classification_and_teacher, tmp_path / f"{name}{i}", "--optimizer", optimizer, *more),
            criterion=name,
        )
        for i, (name, more) in enumerate(
            [
                ("plain", []),
                ("distill", ["--distill-lambda", "0"]),
                ("distill", ["--distill-lambda", "0.1"]),
            ]
        )
    ]
    runs.assert_same_end(ends[0], ends[1])
    assert not runs.same_weights(ends[0], ends[2])


def test_smart_average_is_dropped_with_the_optimizer_state(classification, tmp_path):
    more = ["--no-save-optimizer-state", "--max-update", "1"]
    run = runs.train(classification, tmp_path, *more, criterion="smart")
    assert CRITERION not in run.checkpoint["extra_state"]


def test_a_plain_head_can_be_the_start_of_a_normalised_one(classification, tmp_path):
    """And the normalised checkpoint can be evaluated: it is read with the options it has."""
    start = runs.train(classification, tmp_path / "plain", "--max-update", "2")
    more = ["--finetune-from-model", start.save_dir / "checkpoint_last.pt", "--max-update", "1"]
    more += ["--spectral-norm-classification-head", "--lr", "0"]
    run = runs.train(classification, tmp_path / "normalised", *map(str, more), criterion="r3f")
    plain, normalised = start.checkpoint["model"], run.checkpoint["model"]
    head = "classification_heads.sentence_classification_head.out_proj.weight"
    assert torch.equal(plain[head], normalised[head + "_orig"])
    assert head not in normalised
    from fairseq import checkpoint_utils

    path = str(run.save_dir / "checkpoint_last.pt")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    assert torch.equal(dict(model.named_parameters())[head + "_orig"], plain[head])


HALF = [
    ["--bf16"],
    ["--memory-efficient-bf16"],
    ["--memory-efficient-fp16"],
    ["--fp16", "--fp16-no-flatten-grads"],
]


@pytest.mark.parametrize("mode", HALF, ids=lambda mode: mode[0])
@pytest.mark.parametrize("criterion", ["r3f", "r_drop", "freelb", "smart", "vat", "distill"])
def test_half_precision_is_near_float32(classification_and_teacher, tmp_path, criterion, mode):
    """The loss of the first update, and the adversary's part in it, with perturbations that half
    precision resolves."""
    large = {
        "r3f": ["--eps", "0.1"],
        "vat": ["--vat-xi", "0.3"],
        "smart": "--smart-eps .1 --smart-sigma .1 --smart-step-size .1".split(),
    }
    logs = []
    for options in (mode, []):
        argv = tiny.arguments(classification_and_teacher, tmp_path, *options, criterion=criterion)
        argv += ["--dropout", "0", "--attention-dropout", "0", "--optimizer", "delta_sam_adam"]
        trainer = tiny.build_trainer([*argv, *large.get(criterion, [])])
        log = trainer.train_step(tiny.batches(trainer)[:1])
        logs.append({k: float(v) for k, v in log.items()})
        assert all(torch.isfinite(w).all() for w in tiny.weights(trainer))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.02)
    assert logs[0].keys() >= set(trainer.get_criterion().regulariser_class.TERMS)


def test_freelb_under_autocast(classification, tmp_path):
    """Weights that autocast has cast once serve all steps; the gradient is near float32's."""
    argv = tiny.arguments(classification, tmp_path, "--dropout", "0", criterion="freelb")
    argv += ["--attention-dropout", "0", "--adv-init-mag", "0"]
    trainer = tiny.build_trainer(argv)
    model, criterion = trainer.get_model(), trainer.get_criterion()
    model.train()
    sample, gradients = tiny.batches(trainer)[0], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _, _ = criterion(model, sample)
        loss.backward()
        used = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(used))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
