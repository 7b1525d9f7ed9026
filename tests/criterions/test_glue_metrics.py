"""GLUE's metrics: as fairseq's sentence_prediction has them, and where that one fails."""

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics

from deltasam_fairseq.criterions.glue_metrics import (
    class_ranks,
    f1,
    log_reports,
    matthews,
    pearson,
    spearman,
)
from deltasam_fairseq.criterions.r3f import R3FCriterion
from tests.helpers import tiny


def labels(*names):
    dictionary = Dictionary()
    for name in names:
        dictionary.add_symbol(name)
    return dictionary


def logged(criterion_class, logs):
    with metrics.aggregate(new_root=True) as agg:
        criterion_class.reduce_metrics(logs)
        return agg.get_smoothed_values()


@pytest.mark.parametrize(
    "names, ranks",
    [
        (["1", "0"], [1, 0]),  # MRPC: the more frequent label is class 0
        (["0", "1"], [0, 1]),
        (["not_entailment", "entailment"], [1, 0]),
        (["neutral", "contradiction", "entailment"], [2, 0, 1]),
        (["10", "9"], [1, 0]),  # by number, not by spelling
    ],
)
def test_class_ranks(names, ranks):
    assert class_ranks(labels(*names, "<mask>"), len(names)) == ranks


def test_metrics_by_hand():
    """Targets 1 1 0 0, predicted 1 0 0 0: precision 1, recall 1/2, F1 2/3, Matthews 1/sqrt(3)."""
    predicted, target = [1, 0, 0, 0], [1, 1, 0, 0]
    assert f1(predicted, target) == pytest.approx(2 / 3)
    assert matthews(predicted, target) == pytest.approx(3**-0.5)
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1)


def test_metrics_without_a_value_are_zero():
    """NaN, once the best checkpoint's, would stay so for ever."""
    assert matthews([1, 1], [0, 1]) == 0
    assert f1([0, 0], [1, 0]) == 0
    assert pearson([0.5, 0.5], [0, 1]) == spearman([0.5, 0.5], [0, 1]) == 0


def test_accuracy_is_weighted_by_sentences():
    """3 of 4 and 1 of 1: 80 %, not the mean of 75 and 100."""
    logs = [
        {"loss": 1.0, "ntokens": 9, "nsentences": n, "sample_size": n, "ncorrect": correct}
        for n, correct in ((4, 3), (1, 1))
    ]
    assert logged(R3FCriterion, logs)["accuracy"] == 80


def test_a_validation_begins_anew_and_no_checkpoint_has_its_predictions():
    """fairseq's aggregator "valid" outlives validations; it holds the predictions of the last."""
    with metrics.aggregate(new_root=True):
        for predicted in ([1, 0, 0, 0], [1, 0, 1, 0]):
            log = {"pred": predicted, "targ": [1, 1, 0, 0], "report_mcc": True}
            with metrics.aggregate(new_root=True) as root, metrics.aggregate("valid") as valid:
                log_reports([log])
                log_reports([log])
            expected = round(100 * matthews(predicted, log["targ"]), 1)
            assert root.get_smoothed_values() == valid.get_smoothed_values() == {"mcc": expected}
            (key,) = [name for name in valid if name != "mcc"]
            assert len(valid[key].predicted) == valid.get_smoothed_value(key) == 8
            assert valid.state_dict() == []


@pytest.mark.parametrize("name", ["r3f", "freelb"])
@pytest.mark.parametrize(
    "option, regression",
    [
        ("--report-mcc", False),
        ("--report-acc-and-f1", False),
        ("--report-pearson-and-spearman", True),
    ],
)
def test_agree_with_fairseqs(classification, tmp_path, name, option, regression):
    """In validation, over batches of different sizes, with labels that are numbers."""
    values = []
    for criterion_name in (name, "sentence_prediction"):
        more = ["--regression-target", "--num-classes", "1"] if regression else []
        argv = tiny.arguments(classification, tmp_path, option, *more, criterion=criterion_name)
        if criterion_name == "sentence_prediction":
            from fairseq.criterions.sentence_prediction import SentencePredictionConfig

            if not hasattr(SentencePredictionConfig, "report_mcc"):
                pytest.skip("fairseq 0.12.2 has no such metrics to compare with")
        trainer = tiny.build_trainer(argv)
        trainer.criterion.eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in trainer.get_model().classification_heads.parameters():
                p.add_(torch.randn_like(p))
        logs = [trainer.valid_step(sample) for sample in tiny.batches(trainer, size=7)]
        assert all(logs)
        model, criterion = trainer.get_model(), trainer.get_criterion()
        model.eval()
        outputs = [criterion(model, sample)[2] for sample in tiny.batches(trainer, size=7)]
        found = logged(type(criterion), outputs)
        values.append({k: float(v) for k, v in found.items() if k not in ("pred", "targ")})
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert len(values[0]) >= 3


def test_string_labels(tmp_path):
    """fairseq's sentence_prediction calls int() on them."""
    data = tiny.write_classification(tmp_path / "data", names=("not_entailment", "entailment"))
    argv = tiny.arguments(data, tmp_path, "--report-mcc", "--report-acc-and-f1", criterion="r3f")
    trainer = tiny.build_trainer(argv)
    trainer.get_model().eval(), trainer.get_criterion().eval()
    outputs = [
        trainer.get_criterion()(trainer.get_model(), sample)[2] for sample in tiny.batches(trainer)
    ]
    found = logged(R3FCriterion, outputs)
    assert {"mcc", "f1", "acc_and_f1"} <= set(found)
    assert {x for output in outputs for x in output["pred"] + output["targ"]} <= {0, 1}


def test_predictions_are_gathered_from_ranks_where_sums_would_not_do(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path, "--report-mcc", criterion="r3f")
    criterion = tiny.build_trainer(argv).get_criterion()
    assert criterion.train().logging_outputs_can_be_summed()
    assert not criterion.eval().logging_outputs_can_be_summed()


def test_f1_goes_by_the_classes_of_the_task_not_of_the_split():
    """Of classes 0 1 2 the last is absent. Class 0: 2 * 4/5 / (9/5) = 8/9; class 1: 2/3."""
    predicted, target = [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]
    assert f1(predicted, target, 3) == pytest.approx((8 / 9 + 2 / 3) / 2)
    log = {"report_acc_and_f1": True, "pred": predicted, "targ": target}
    found = {}
    for classes in (2, 3):
        with metrics.aggregate(new_root=True) as agg:
            log_reports([{**log, "classes": classes}])
            found[classes] = agg.get_smoothed_values()["f1"]
    assert found == {2: 66.7, 3: 77.8}
