"""Wrong options end the program before any data is loaded: exit code 2, a remedy, no traceback."""

import fairseq_cli.train
import pytest

import deltasam_fairseq.config_checks
from tests.helpers import runs, tiny

SAM, DELTA = ["--optimizer", "sam_adam"], ["--optimizer", "delta_sam_adam"]

# options; what the message must name: option, value, remedy
ERRORS = {
    "negative rho": ([*SAM, "--sam-rho", "-1"], ["--sam-rho -1", "at least 0", "0.02"]),
    "rho nan": ([*SAM, "--sam-rho", "nan"], ["--sam-rho nan", "finite", "0.02"]),
    "rho inf": ([*DELTA, "--sam-rho", "inf"], ["--sam-rho inf", "finite", "0.02"]),
    "rho no number": ([*SAM, "--sam-rho", "big"], ["--sam-rho", "big"]),
    "negative beta": ([*DELTA, "--delta-sam-beta", "-3"], ["--delta-sam-beta -3", "at least 0"]),
    "beta nan": ([*DELTA, "--delta-sam-beta", "nan"], ["--delta-sam-beta nan", "finite"]),
    "probe of radius 0": (
        [*DELTA, "--delta-sam-probe-radius", "0"],
        ["--delta-sam-probe-radius 0", "above 0", "omit it"],
    ),
    "beta without delta-SAM": (
        [*SAM, "--delta-sam-beta", "3"],
        ["--delta-sam-beta 3", "--optimizer delta_sam_*"],
    ),
    "eta without ASAM": ([*SAM, "--sam-eta", "0.1"], ["--sam-eta 0.1", "--sam-adaptive"]),
    "negative eta": ([*SAM, "--sam-adaptive", "--sam-eta", "-1"], ["--sam-eta -1", "at least 0"]),
    "negative start": ([*SAM, "--sam-start-update", "-1"], ["--sam-start-update -1", "at least 0"]),
    "scope": ([*SAM, "--sam-scope", "node"], ["--sam-scope", "node", "global", "rank"]),
    "no sentences": (
        [*SAM, "--sam-ascent-fraction", "0"],
        ["--sam-ascent-fraction 0", "above 0", "at most 1", "0.25"],
    ),
    "more than all sentences": (
        [*DELTA, "--sam-ascent-fraction", "25"],
        ["--sam-ascent-fraction 25", "at most 1"],
    ),
    "fraction nan": ([*SAM, "--sam-ascent-fraction", "nan"], ["--sam-ascent-fraction nan"]),
    "no update": ([*SAM, "--sam-every", "0"], ["--sam-every 0", "at least 1"]),
    "part of an update": ([*SAM, "--sam-every", "1.5"], ["--sam-every", "1.5"]),
    "no regular expression": (
        [*SAM, "--sam-only", "layers.(0|1"],
        ["--sam-only layers.(0|1", "no regular expression", "layer_norm"],
    ),
    "empty pattern": ([*DELTA, "--sam-only", ""], ["--sam-only ''", "omit it"]),
    "fraction of adam": (["--sam-ascent-fraction", "0.5"], ["--sam-ascent-fraction", "sam_*"]),
    "rho of adam": (["--optimizer", "adam", "--sam-rho", "0.1"], ["--sam-rho", "sam_*"]),
    "beta of adam": (["--delta-sam-beta", "1"], ["--delta-sam-beta", "delta_sam_*"]),
    "optimizer that is none": (["--optimizer", "sam_adamw"], ["--optimizer", "sam_adamw"]),
    "no such checkpoint": (
        [*SAM, "--restore-file", "/no/such.pt"],
        ["--restore-file /no/such.pt", "does not exist", "omit --restore-file"],
    ),
    "no such checkpoint, without SAM": (
        ["--finetune-from-model", "/no/such.pt"],
        ["--finetune-from-model /no/such.pt", "does not exist"],
    ),
    "bmuf": ([*SAM, "--use-bmuf"], ["--use-bmuf", "--optimizer sam_adam"]),
    "slowmo": ([*SAM, "--ddp-backend", "slowmo"], ["--ddp-backend slowmo", "legacy_ddp"]),
    "fully sharded": (
        [*SAM, "--ddp-backend", "fully_sharded"],
        ["--ddp-backend fully_sharded", "legacy_ddp"],
    ),
}


@pytest.fixture
def data_must_not_load(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("fairseq went on to train")

    monkeypatch.setattr(fairseq_cli.train.tasks, "setup_task", fail)


def error_of(argv, monkeypatch, capfd):
    """What fairseq-train writes to stderr before it exits with code 2."""
    monkeypatch.setattr("sys.argv", ["fairseq-train", *argv])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        fairseq_cli.train.cli_main()
    assert exit_.value.code == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error: ") :]


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_option(tmp_path, monkeypatch, capfd, data_must_not_load, name):
    options, expected = ERRORS[name]
    message = error_of(tiny.arguments(tmp_path, tmp_path, *options), monkeypatch, capfd)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "criterion", ["composite_loss", "adaptive_loss", "ctc", "model", "wav2vec"]
)
def test_criterion_without_per_sentence_losses(
    tmp_path, monkeypatch, capfd, data_must_not_load, criterion
):
    argv = tiny.arguments(tmp_path, tmp_path, *DELTA, criterion="cross_entropy")
    argv += ["--criterion", criterion]
    if criterion == "composite_loss":
        argv += ["--underlying-criterion", "cross_entropy"]
    message = error_of(argv, monkeypatch, capfd)
    for part in (f"--criterion {criterion}", "--optimizer sam_adam", "per_sentence_losses"):
        assert part in message


def test_task_with_a_train_step_of_its_own(tmp_path, monkeypatch, capfd, data_must_not_load):
    argv = tiny.arguments(tmp_path, tmp_path, *DELTA, criterion="cross_entropy")
    argv += "--task translation_from_pretrained_xlm".split()
    argv[argv.index("--task") + 1] = "multilingual_translation"
    argv += ["--task", "multilingual_translation", "--lang-pairs", "aa-bb"]
    argv += ["--arch", "multilingual_transformer"]
    message = error_of(argv, monkeypatch, capfd)
    for part in ("--task multilingual_translation", "--optimizer sam_adam", "train_step"):
        assert part in message


@pytest.mark.parametrize(
    "options",
    [
        [*DELTA, "--delta-sam-beta", "0", "--criterion", "adaptive_loss"],
        [*DELTA, "--sam-rho", "0", "--criterion", "adaptive_loss"],
        [*SAM, "--criterion", "adaptive_loss"],
        [*SAM, "--sam-adaptive", "--sam-eta", "0", "--sam-rho", "1.5", "--sam-start-update", "9"],
        [*DELTA, "--delta-sam-beta", "1e3", "--sam-scope", "rank"],
        ["--optimizer", "adam", "--use-bmuf"],
        ["--optimizer", "adam", "--zero-sharding", "os"],
    ],
    ids=" ".join,
)
def test_right_options_are_not_refused(tmp_path, options):
    deltasam_fairseq.config_checks.check_config(
        runs.parse(tiny.arguments(tmp_path, tmp_path, *options, criterion="cross_entropy"))
    )


def test_hydra_configuration_is_checked_too(tmp_path, data_must_not_load):
    """fairseq-hydra-train has no parser that could say it; it is said before data is loaded."""
    cfg = runs.parse(tiny.arguments(tmp_path, tmp_path, *SAM))
    cfg.optimizer.sam_rho = -1.0
    with pytest.raises(ValueError, match="--sam-rho -1.0: must be finite and at least 0"):
        fairseq_cli.train.main(cfg)


def test_in_a_process_of_its_own(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path / "run", *SAM, "--sam-rho", "-1")
    result = tiny.train(argv, check=False)
    assert result.returncode == 2
    assert "error: --sam-rho -1.0: must be finite and at least 0" in result.stdout
    assert "Traceback" not in result.stdout and "Loaded train" not in result.stdout
    assert not (tmp_path / "run").exists()


def test_fewer_classes_than_labels(classification, tmp_path, monkeypatch, capfd):
    """fairseq alone: IndexError in the first update."""
    argv = tiny.arguments(classification, tmp_path, "--num-classes", "1")
    message = error_of(argv, monkeypatch, capfd)
    for part in ("--num-classes 1", "the data has 2 labels", "give --num-classes 2"):
        assert part in message


def test_numbers_without_regression_target(tmp_path, monkeypatch, capfd, data_must_not_load):
    """fairseq alone: FileNotFoundError of label/dict.txt."""
    (tmp_path / "label").mkdir()
    (tmp_path / "label" / "train.label").write_text("0.5\n")
    message = error_of(tiny.arguments(tmp_path, tmp_path), monkeypatch, capfd)
    assert "give --regression-target and --num-classes 1" in message
