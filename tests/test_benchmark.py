"""The benchmark runs, and its figures are those of the clock."""

import contextlib
import functools
import json
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import benchmark  # noqa: E402
import benchmark_methods  # noqa: E402
import benchmark_phases  # noqa: E402
import benchmark_report  # noqa: E402

SMALL = "--shape small --batch-size 2 --length 8 --threads 1 --device cpu".split()


def run(out, *more, code=0):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *SMALL, "--out", str(out)]
    result = subprocess.run([*command, *more], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_report(tmp_path):
    """Every method is in the table; one that cannot run here is named with the reason."""
    methods = ["Adam", "SAM", "delta-SAM", "delta-SAM, two forwards", *benchmark_methods.PEERS]
    words = ["--methods", *methods, "--rounds", "2", "--phase-rounds", "1", "--trace"]
    text = run(tmp_path, *words).stdout
    assert text.strip() == (tmp_path / "benchmark.md").read_text().strip()
    record = json.loads((tmp_path / "benchmark.json").read_text())
    (result,) = record["results"]
    assert record["machine"]["command"].startswith("python scripts/benchmark.py --shape small")
    assert "--davda54 FILE" in result["left_out"]["SAM, davda54"]
    assert set(methods) == set(result["rows"]) | set(result["left_out"])
    assert all(f"| {name}" in text for name in methods)
    assert result["rows"]["Adam"]["wall_ratio"] == 1
    phases = result["phases"]["delta-SAM"]
    assert {"forward", "backward", "probe: draw", "perturb, norms", "base step"} <= set(phases)
    assert "probe: draw" not in result["phases"]["SAM"]
    # SAM keeps one copy of the weights: 8192 words of 256 numbers alone are 8 MiB.
    memory = result["memory"]
    assert memory["delta-SAM"] > memory["Adam"] + 8 * 2**20
    assert json.loads((tmp_path / "delta-SAM.json").read_text())["traceEvents"]


def test_accumulation_and_half_precision(tmp_path):
    """A comparison for each; the peers have neither fp16 nor a say in it."""
    words = ["--update-freq", "1", "2", "--precision", "fp32", "memory-efficient-bf16"]
    words += ["--methods", "Adam", "delta-SAM", "SAM, torch loop", "SAM, davda54", "Adam, fused"]
    words += ["--davda54", str(tmp_path / "none.py"), "--rounds", "1"]
    run(tmp_path, *words, "--phase-rounds", "0", "--no-memory")
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    settings = [(r["setting"]["precision"], r["setting"]["update_freq"]) for r in results]
    assert settings == [(p, n) for p in ("fp32", "memory-efficient-bf16") for n in (1, 2)]
    assert "half precision" in results[2]["left_out"]["SAM, torch loop"]
    assert "none.py: not a Python file" in results[0]["left_out"]["SAM, davda54"]
    assert "take the loop" in results[2]["left_out"]["Adam, fused"]
    assert not results[0]["phases"] and not results[0]["memory"]


def test_the_torch_loop_is_sam(tmp_path):
    """Without dropout it goes where sam_adam goes, so that equal things are timed."""
    setting = benchmark_methods.Setting("small", 4, 8, 2, "fp32", "cpu")
    sam = benchmark_methods.build("SAM", setting)
    loop = benchmark_methods.build("SAM, torch loop", setting)
    for built in (sam, loop):
        for module in built.trainer.get_model().modules():
            for name in ("p", "dropout", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        for parameter_group in built.trainer.optimizer.param_groups:
            parameter_group["lr"] = 1e-5
    start = [p.detach().clone() for p in sam.trainer.get_model().parameters()]
    for seed in range(3):
        samples = benchmark_methods.samples_of(setting, 2, seed)
        sam.update(samples)
        loop.update(samples)
    pairs = zip(sam.trainer.get_model().parameters(), loop.trainer.get_model().parameters(), start)
    moved = difference = 0.0
    for one, other, own in pairs:
        moved += (one - own).square().sum().item()
        difference += (one - other).square().sum().item()
    assert 0 < difference < 0.05 * moved or difference == 0


def test_two_processes(tmp_path):
    """Twice the sentences an update; the reductions are timed by themselves."""
    words = ["--processes", "1", "2", "--methods", "Adam", "delta-SAM", "SAM, torch loop"]
    text = run(tmp_path, *words, "--rounds", "1", "--no-memory", "--phase-rounds", "1").stdout
    one, two = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert (one["setting"]["processes"], two["setting"]["processes"]) == (1, 2)
    assert "one process" in two["left_out"]["SAM, torch loop"]
    for result, sentences in ((one, 2), (two, 4)):
        row = result["rows"]["Adam"]
        assert row["samples_per_second"] == pytest.approx(sentences / row["seconds"])
    numbers = {"one float64 number", "four float64 numbers", "1000 float64 numbers"}
    assert set(two["reductions"]) == {*numbers, "gradients, float32"}
    assert "2 processes" in text and "four float64 numbers" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "SAM, torch loop", "Adam"], "--methods SAM, torch loop"),
        (["--batch-size", "0"], "--batch-size"),
        (["--phase-rounds", "-1"], "--phase-rounds"),
    ],
)
def test_wrong_options(tmp_path, words, message):
    assert message in run(tmp_path, *words, code=2).stderr


def test_every_rank_has_sentences_of_its_own():
    """Four updates of two ranks are eight batches."""
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp32", "cpu", processes=2)
    found = [
        benchmark_methods.samples_of(setting._replace(rank=rank), 1, seed)[0]["net_input"]
        for rank in range(2)
        for seed in range(4)
    ]
    assert len({tuple(each["src_tokens"].flatten().tolist()) for each in found}) == 8


def test_the_paper_s_second_forward_counts_as_one():
    """Of delta-SAM with two forwards: not as preparation."""
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp32", "cpu")
    built = benchmark_methods.build(benchmark_methods.TWO_FORWARDS, setting)
    built.update(benchmark_methods.samples_of(setting, 1))  # the first one checks the criterion too
    marks = []

    def mark(name, args=None):
        marks.append(name)
        return contextlib.nullcontext()

    with unittest.mock.patch.object(torch.autograd.profiler, "record_function", mark):
        built.update(benchmark_methods.samples_of(setting, 1))
    assert marks.count("sam-forward-nograd") == 2


def test_numbers_stand_on_the_axis_by_size():
    """Not by the time that each took."""
    rows = {"Adam": {"seconds": 1.0}}
    results = [{"setting": {"length": n}, "rows": rows, "base": "Adam"} for n in (64, 16, 128)]
    results.sort(key=functools.partial(benchmark_report._place, "length"))
    assert [r["setting"]["length"] for r in results] == [16, 64, 128]


def test_phases_by_hand():
    """On a clock that is read once a mark: inner phases do not count for outer ones."""
    times = iter([0, 1, 3, 7, 12, 20, 30, 31])
    clock = benchmark_phases.PhaseClock(lambda: None, lambda: float(next(times)))
    mark = "record_function"
    own = getattr(torch.autograd.profiler, mark)
    with clock.running():  # 0
        with torch.autograd.profiler.record_function("sam-ascent"):  # 1
            with torch.autograd.profiler.record_function("forward"):  # 3
                with torch.autograd.profiler.record_function("not ours"):
                    pass
            # 7
        # 12
        with torch.autograd.profiler.record_function("sam-restore"):  # 20
            pass
        # 30
    # 31
    assert getattr(torch.autograd.profiler, mark) is own
    assert clock.seconds == {
        benchmark_phases.REST: 1 + 8 + 1,
        "rest of the ascent": 2 + 5,
        "forward": 4,
        "restore": 10,
    }


def test_floor_by_hand():
    """Forward 1, backward 2, no-grad forward 1: (2 x 3 + 1) / (2 x 3) = 7/6."""
    ratios = dict(zip(benchmark.PASSES, (1.0, 1.0, 3.0)))
    rows = {name: {"wall_ratio": ratio} for name, ratio in ratios.items()}
    for precision, update_freq, forwards in (("fp32", 1, 1), ("fp16", 2, 2), ("bf16", 2, 3)):
        setting = benchmark_methods.Setting("small", 4, 8, update_freq, precision, "cpu")
        found = benchmark.floor(rows, setting, "wall")
        assert found["delta-SAM / SAM"] == pytest.approx((6 + forwards) / 6)
        assert found["backward / forward"] == 2


def test_updates_that_are_not_alike_are_timed_together(monkeypatch):
    """With --sam-every 2, one with and one without an ascent, 3 s and 1 s: 2 s an update."""
    clock, made = [0.0], []

    def update(samples):
        made.append(samples)
        clock[0] += 3 if len(made) % 2 else 1

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    assert benchmark.timed(update, 2, [], lambda: None)["wall"] == 2
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp32", "cpu")
    assert benchmark_methods.build("SAM, every 2nd", setting).period == 2


def test_summary_by_hand():
    setting = benchmark_methods.Setting("small", 4, 8, 2, "fp32", "cpu")
    seconds = {
        "Adam": {"wall": [1.0, 2.0, 4.0], "cpu": [1.0, 1.0, 1.0]},
        "SAM": {"wall": [2.0, 6.0, 8.0], "cpu": [2.0, 2.5, 3.0]},
    }
    row = benchmark.summary(seconds, setting, "Adam")["SAM"]
    assert row["seconds"] == 6 and row["samples_per_second"] == pytest.approx(8 / 6)
    assert row["wall_ratio"] == 2 and row["cpu_ratio"] == 2.5
    assert benchmark_report.title(setting._asdict()).endswith("2 micro-batches an update")
