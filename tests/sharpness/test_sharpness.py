"""Measured sharpness: numbers worked by hand, the plain twins, and the command on tiny models."""

import copy
import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion

from deltasam_fairseq.algorithms.reference import (
    delta_sam_reference,
    per_instance_reference,
    sam_reference,
)
from deltasam_fairseq.algorithms.sharpness import (
    Landscape,
    clean_losses,
    cosine,
    delta_sam_direction,
    loss_curve,
    losses_at,
    mean_over_batches,
    mean_rise,
    per_instance_rises,
    sam_direction,
)
from deltasam_fairseq.options import UsageError
from deltasam_fairseq.sharpness import ModelLandscapes, __main__, measure
from deltasam_fairseq.sharpness.landscapes import Batch
from deltasam_fairseq.sharpness.options import get_parser
from tests.helpers import tiny


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def landscape(losses, w):
    """A `Landscape` of a function from a weight vector, shape (d,), to losses, shape (N,)."""

    def at(write):
        out = [torch.full_like(w, math.nan)]
        if write is None:
            return losses(w)
        write(out)
        return losses(out[0])

    def gradient(c):
        leaf = w.clone().requires_grad_()
        return list(torch.autograd.grad((c * losses(leaf)).sum(), leaf))

    return Landscape([w], at, gradient)


def bowls(*centres):
    """l_j(w) = ||w - c_j||^2 / 2: gradient w - c_j, curvature 1 in every direction."""
    c = torch.stack(centres)
    return lambda w: (w - c).square().sum(dim=1) / 2


def curved(n=6, d=5):
    torch.manual_seed(1)
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    return (lambda w: ((x @ w).tanh() - y).square()), torch.randn(d, dtype=torch.float64)


# By hand


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_two_bowls_by_hand(rho):
    """Centres (3, 0) and (0, 4), w = 0: gradients (-3, 0), (0, -4), mean (-1.5, -2) of norm 2.5.

    Along a unit direction d, l_j rises by rho <grad l_j, d> + rho^2 / 2. So per-batch sharpness
    is 2.5 rho + rho^2 / 2, per-instance 3.5 rho + rho^2 / 2.
    """
    two = landscape(bowls(double(3, 0), double(0, 4)), double(0, 0))
    clean = clean_losses(two)
    assert clean.tolist() == [4.5, 8.0]
    direction = sam_direction(two, clean)
    assert direction[0].tolist() == [-1.5, -2.0]
    found = mean_rise(two, clean, direction, rho)
    torch.testing.assert_close(found, torch.tensor(2.5 * rho + rho**2 / 2).double())

    alone = [landscape(bowls(c), double(0, 0)) for c in (double(3, 0), double(0, 4))]
    rises = per_instance_rises(alone, [rho])
    torch.testing.assert_close(rises[:, 0], double(3, 4) * rho + rho**2 / 2)


def test_reweighted_by_hand():
    """Same bowls, probe along (-1, 0), rho 2: a = (3 rho + rho^2 / 2, rho^2 / 2) = (8, 2).

    g = (0.8, 0.2), r = beta 5 / (0.8 * 8 + 0.2 * 2) = beta 5 / 6.8; with beta 1.36 r = 1, so
    g' = g and the ascent gradient is (-2.4, -0.8), of direction (-3, -1) / sqrt(10).
    Mean rise: rho <(-1.5, -2), d> + rho^2 / 2 = 2 * 6.5 / sqrt(10) + 2.
    """
    two = landscape(bowls(double(3, 0), double(0, 4)), double(0, 0))
    clean = clean_losses(two)
    direction = delta_sam_direction(two, clean, [double(-7, 0)], rho=2.0, beta=1.36)
    torch.testing.assert_close(direction[0], double(-2.4, -0.8))
    rise = mean_rise(two, clean, direction, 2.0)
    torch.testing.assert_close(rise, torch.tensor(13 / math.sqrt(10) + 2).double())


def test_curve_by_hand():
    """l = ||w||^2 / 2 at w = (3, 4) along (0, 2): (9 + (4 + t)^2) / 2."""
    one = landscape(bowls(double(0, 0)), double(3, 4))
    found = loss_curve(one, [double(0, 2)], [-4.0, 0.0, 1.0])
    torch.testing.assert_close(found, double(4.5, 12.5, 17.0))


def test_flat_batch_has_no_sharpness():
    """A zero gradient perturbs nothing: 0, never NaN."""
    one = landscape(bowls(double(1, 1)), double(1, 1))
    clean = clean_losses(one)
    direction = sam_direction(one, clean)
    assert mean_rise(one, clean, direction, 0.5) == 0
    assert per_instance_rises([one], [0.5]).tolist() == [[0.0]]
    assert cosine(direction, direction) == 0


def test_cosine_by_hand():
    """<((1, 0), (1)), ((1, 1), (0))> = 1, both of length sqrt(2)."""
    a, b = [double(1, 0), double(1)], [double(1, 1), double(0)]
    torch.testing.assert_close(cosine(a, b), torch.tensor(0.5).double())
    torch.testing.assert_close(cosine(a, [-3 * x for x in a]), torch.tensor(-1.0).double())


def test_mean_over_batches_by_hand():
    """1 and 4 with counts 3 and 1: mean 1.75; se^2 = 2 ((3/4 0.75)^2 + (1/4 2.25)^2) = 1.125^2."""
    mean, error = mean_over_batches(double(1, 4), torch.tensor([3, 1]))
    assert (mean.item(), error.item()) == pytest.approx((1.75, 1.125))


def test_standard_error_of_equal_batches_is_the_usual_one():
    values = torch.randn(7, 3, dtype=torch.float64)
    mean, error = mean_over_batches(values, torch.full((7,), 4))
    torch.testing.assert_close(mean, values.mean(dim=0))
    torch.testing.assert_close(error, values.std(dim=0) / math.sqrt(7))
    assert mean_over_batches(values[:1], torch.tensor([4]))[1].isnan().all()


# Reduces to, and the twins


def test_per_instance_of_one_sentence_is_per_batch():
    losses, w = curved(n=1)
    one = landscape(losses, w)
    clean = clean_losses(one)
    per_batch = mean_rise(one, clean, sam_direction(one, clean), 0.3)
    assert per_instance_rises([one], [0.3]).item() == per_batch.item()


def test_beta_zero_is_per_batch():
    losses, w = curved()
    some = landscape(losses, w)
    clean = clean_losses(some)
    direction = delta_sam_direction(some, clean, [torch.randn_like(w)], 0.05, beta=0.0)
    torch.testing.assert_close(direction, sam_direction(some, clean), rtol=0, atol=0)


def test_equals_the_twins():
    losses, w = curved()
    some, u, rho = landscape(losses, w), torch.randn(5, dtype=torch.float64), 0.3
    clean = clean_losses(some)
    twin = losses(w + sam_reference(losses, w, rho)).mean() - losses(w).mean()
    torch.testing.assert_close(mean_rise(some, clean, sam_direction(some, clean), rho), twin)

    twin = losses(w + delta_sam_reference(losses, w, u, rho, 3.0).eps).mean() - losses(w).mean()
    direction = delta_sam_direction(some, clean, [u], rho, 3.0)
    torch.testing.assert_close(mean_rise(some, clean, direction, rho), twin)

    eps = per_instance_reference(losses, w, rho)
    twin = torch.stack([(losses(w + e) - losses(w))[j] for j, e in enumerate(eps)])
    alone = [landscape(lambda v, j=j: losses(v)[j : j + 1], w) for j in range(6)]
    torch.testing.assert_close(per_instance_rises(alone, [rho])[:, 0], twin)


# A fairseq model


@pytest.fixture(scope="module")
def trainer(classification, tmp_path_factory):
    """A classifier after a few updates of plain Adam; its dropout is 0.1."""
    trainer = tiny.build_trainer(
        tiny.arguments(classification, tmp_path_factory.mktemp("save"), "--lr", "3e-3")
    )
    for _ in range(5):
        for batch in tiny.batches(trainer):
            trainer.train_step([batch])
    return trainer


def save(trainer, path):
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {})
    return path


@pytest.fixture(scope="module")
def checkpoint(trainer, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    return save(trainer, path)


def landscapes_of(trainer, criterion=None):
    model = copy.deepcopy(trainer.get_model())
    return ModelLandscapes(model, criterion or copy.copy(trainer.get_criterion()), seed=1)


def test_model_against_arithmetic_on_a_copy(trainer):
    """rho g / ||g|| added to a copy's weights by hand, fairseq's own loss there."""
    landscapes, sample, rho = landscapes_of(trainer), tiny.batches(trainer)[0], 0.05
    some = landscapes.of(sample)
    clean = clean_losses(some)
    found = mean_rise(some, clean, sam_direction(some, clean), rho)

    model, criterion = copy.deepcopy(landscapes.model), landscapes.criterion
    before = criterion(model, sample)[0]
    before.backward()
    weights = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in weights]).norm()
    with torch.no_grad():
        for p in weights:
            p.add_(p.grad, alpha=rho / norm.item())
        after = criterion(model, sample)[0]
    assert clean.mean().item() == pytest.approx(before.item() / 8, rel=1e-5)
    # The difference of two float32 losses.
    assert found.item() == pytest.approx((after - before).item() / 8, rel=1e-3)


def test_weights_and_gradients_are_left_as_they_were(trainer):
    landscapes, sample = landscapes_of(trainer), tiny.batches(trainer)[0]
    before = [(p.data_ptr(), p.data.clone()) for p in landscapes.parameters]
    batch = Batch(0, 8, sample, lambda: iter([]))
    list(measure(landscapes, [batch], [0.05], 3.0, seed=1, radii=[0.1], random_directions=1))
    for (pointer, value), p in zip(before, landscapes.parameters):
        assert p.data_ptr() == pointer and torch.equal(p.data, value) and p.grad is None


def test_weights_are_restored_when_a_forward_fails(trainer):
    landscapes, sample = landscapes_of(trainer), tiny.batches(trainer)[0]
    some = landscapes.of(sample)
    before = [p.data.clone() for p in landscapes.parameters]
    direction = sam_direction(some, clean_losses(some))
    landscapes.model.forward = None
    with pytest.raises(TypeError):
        losses_at(some, direction, 0.05)
    assert all(torch.equal(b, p.data) for b, p in zip(before, landscapes.parameters))


def test_criterion_without_per_sentence_losses_has_the_per_batch_figure(trainer):
    class Unknown(SentencePredictionCriterion):
        pass

    sample = tiny.batches(trainer)[0]
    batch = Batch(0, 8, sample, lambda: iter([]))
    unknown = copy.copy(trainer.get_criterion())
    unknown.__class__ = Unknown
    (found,) = measure(landscapes_of(trainer, unknown), [batch], [0.05], 3.0, seed=1)
    (known,) = measure(landscapes_of(trainer), [batch], [0.05], 3.0, seed=1)
    assert found.reweighted is None and found.cosine is None
    torch.testing.assert_close(found.loss, known.loss)
    # The difference of two float32 losses.
    torch.testing.assert_close(found.per_batch, known.per_batch, rtol=1e-3, atol=1e-6)


def test_per_instance_refuses_losses_that_depend_on_the_batch(trainer):
    class Contrast(SentencePredictionCriterion):
        def per_sentence_losses(self, model, sample):
            logits, _ = model(
                **sample["net_input"],
                features_only=True,
                classification_head_name=self.classification_head_name,
            )
            return logits[:, 0] - logits[:, 0].mean() + 5.0 * len(logits), 1, {}

    sample = tiny.batches(trainer)[0]
    dataset = trainer.task.dataset("train")
    batch = Batch(0, 8, sample, lambda: (dataset.collater([dataset[i]]) for i in range(8)))
    contrast = copy.copy(trainer.get_criterion())
    contrast.__class__ = Contrast
    with pytest.raises(UsageError, match="--per-instance.*Contrast.*drop --per-instance"):
        list(measure(landscapes_of(trainer, contrast), [batch], [0.05], 3.0, 1, True))


# The command


def run(*argv):
    return __main__.main(get_parser().parse_args([*map(str, argv), "--log-format", "none"]))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_command_end_to_end(classification, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    before = digest(checkpoint)
    command = [sys.executable, "-m", "deltasam_fairseq.sharpness", classification]
    command += ["--path", checkpoint, "--batch-size", 4, "--sam-rho-list", 0.01, 0.1]
    command += ["--delta-sam-beta", 3, "--per-instance", "--plot-points", 5, "--log-interval", 2]
    command += ["--plot", tmp_path / "s.png", "--json", tmp_path / "s.json"]
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert done.returncode == 0, done.stderr
    assert "16 sentences in 4 batches; eval mode (no dropout), float32" in done.stdout
    assert "nats per sentence" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("0.")]) == 2
    assert "sharpness on 'valid'" in done.stderr
    assert digest(checkpoint) == before

    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["sentences"], found["batches"], found["mode"]) == (16, 4, "eval")
    assert [row["rho"] for row in found["sharpness"]] == [0.01, 0.1]
    for row in found["sharpness"]:
        # First order: ||mean g|| <= mean ||g||; eps* is the steepest for the batch.
        assert 0 < row["per_batch"]["mean"] < row["per_instance"]["mean"]
        assert all(row[key]["standard_error"] > 0 for key in ("per_batch", "per_instance"))
        assert -1 <= row["cosine"]["mean"] <= 1
    assert found["sharpness"][0]["reweighted"]["mean"] < found["sharpness"][0]["per_batch"]["mean"]
    curves = found["curves"]
    assert curves["radii"] == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2])
    assert len(curves["random"]) == 5
    for line in (curves["sam"], curves["delta_sam"], *curves["random"]):
        assert line[2] == pytest.approx(found["loss"]["mean"], rel=1e-6)
    # The curve at rho is the clean loss and per-batch sharpness.
    per_batch = found["sharpness"][1]["per_batch"]["mean"]
    assert curves["sam"][3] - found["loss"]["mean"] == pytest.approx(per_batch, rel=1e-6)


def test_loaded_checkpoint_has_the_sharpness_of_the_model_in_memory(
    trainer, classification, checkpoint, capsys
):
    trainer.task.load_dataset("valid")
    dataset = trainer.task.dataset("valid")
    sample = dataset.collater([dataset[i] for i in range(16)])
    batch = Batch(0, 16, sample, lambda: iter([]))
    (in_memory,) = measure(landscapes_of(trainer), [batch], [0.05, 0.1], 3.0, seed=1)
    argv = [classification, "--path", checkpoint, "--batch-size", 16, "--sam-rho-list", 0.05, 0.1]
    (loaded,) = run(*argv).batches
    capsys.readouterr()
    for figure in ("loss", "per_batch", "cosine"):
        # Differences of float32 losses, sentences in another order.
        torch.testing.assert_close(
            getattr(loaded, figure), getattr(in_memory, figure), rtol=1e-3, atol=1e-5
        )


def test_command_is_deterministic_and_probes_by_the_batch(classification, checkpoint, capsys):
    """The same batch has the same figures, however many others are measured."""
    argv = [classification, "--path", checkpoint, "--batch-size", 4, "--seed", 5]
    everything = run(*argv).batches
    assert all(
        torch.equal(a.reweighted, b.reweighted) for a, b in zip(everything, run(*argv).batches)
    )
    (one,) = run(*argv, "--max-batches", 1).batches
    (same,) = [b for b in everything if torch.equal(b.loss, one.loss)]
    assert torch.equal(one.reweighted, same.reweighted)
    assert "NaN" not in json.dumps(__main__.as_dict(run(*argv, "--max-batches", 1)))
    capsys.readouterr()


@pytest.mark.parametrize("criterion", ["masked_lm", "label_smoothed_cross_entropy"])
def test_token_level_criterions(criterion, data_of, tmp_path, capsys):
    """Padding, batches by length, masks drawn by the data set: alone as in the batch.

    fairseq 0.12 would run a freshly loaded ReLU encoder in fused layers without gradients.
    """
    trainer = tiny.build_trainer(
        tiny.arguments(data_of[criterion], tmp_path, criterion=criterion), None
    )
    path = save(trainer, tmp_path / "checkpoint.pt")
    argv = [data_of[criterion], "--path", path, "--batch-size", 8, "--per-instance"]
    (row, *_) = __main__.as_dict(run(*argv))["sharpness"]
    assert 0 < row["per_batch"]["mean"] < row["per_instance"]["mean"]
    capsys.readouterr()


def test_criterion_without_per_sentence_losses_is_named(
    classification, checkpoint, capsys, monkeypatch
):
    monkeypatch.setattr(
        "deltasam_fairseq.sharpness.landscapes.has_per_sentence_losses", lambda _: 0
    )
    argv = [classification, "--path", checkpoint, "--batch-size", 8, "--per-instance"]
    report = run(*argv)
    out = capsys.readouterr().out
    assert "Only per-batch sharpness: criterion SentencePredictionCriterion gives no" in out
    assert "reweighted (beta" not in out
    assert __main__.as_dict(report)["sharpness"][0]["per_instance"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sam-rho-list", "0.01", "0"], "--sam-rho-list 0.0: must be finite and above 0"),
        (["--sam-rho-list", "-0.1"], "--sam-rho-list -0.1: must be finite and above 0"),
        (["--sam-rho-list", "nan"], "--sam-rho-list nan: must be"),
        (["--delta-sam-beta", "-1"], "--delta-sam-beta -1.0: must be finite and at least 0"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--max-batches", "0"], "--max-batches 0: must be at least 1"),
        (["--path", "nowhere.pt"], "--path nowhere.pt: is not a file; give the path"),
        (["--path", __file__], "--path: .*(test_sharpness.py) (was not loaded|could not be read)"),
        (["--valid-subset", "vlid"], "--valid-subset vlid: not found.*there are train, valid"),
        (["--json", "nowhere/s.json"], "--json nowhere/s.json: directory .*nowhere does not exist"),
        (["--plot", "s.doc"], "--plot s.doc: the name must end in .png"),
        (["--plot", "s.png", "--plot-radius", "-1"], "--plot-radius -1.0: must be finite"),
        (["--model-overrides", "1 +"], r"--model-overrides 1 \+: must be a Python dict"),
    ],
)
def test_errors_name_option_value_and_remedy(options, message, classification, checkpoint):
    with pytest.raises(UsageError, match=message):
        run(classification, "--path", checkpoint, "--batch-size", 4, *options)


def test_empty_split(checkpoint, tmp_path):
    data = tiny.write_classification(tmp_path / "data", valid=0)
    with pytest.raises(UsageError, match="--valid-subset valid: the split in .* is empty"):
        run(data, "--path", checkpoint, "--batch-size", 4)


def test_missing_data_and_batch_size(classification, checkpoint):
    with pytest.raises(UsageError, match="DATA nowhere does not exist"):
        run("nowhere", "--path", checkpoint, "--batch-size", 4)
    with pytest.raises(UsageError, match="--batch-size is missing"):
        run(classification, "--path", checkpoint)


def test_missing_matplotlib(classification, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="--plot s.png: matplotlib is not installed; run pip"):
        run(classification, "--path", checkpoint, "--batch-size", 4, "--plot", "s.png")


def test_usage_errors_exit_with_2_and_without_traceback(classification):
    done = subprocess.run(
        [sys.executable, "-m", "deltasam_fairseq.sharpness", str(classification)]
        + ["--path", "nowhere.pt", "--batch-size", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert "Traceback" not in done.stderr and "--path nowhere.pt" in done.stderr
