"""The benchmark runs, and its figures are those of the clock."""

import contextlib
import functools
import json
import subprocess
import sys
import time
import types
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import figures as benchmark_figures
from scripts.benchmark import machine as benchmark_machine
from scripts.benchmark import methods as benchmark_methods
from scripts.benchmark import options as benchmark_options
from scripts.benchmark import phases as benchmark_phases
from scripts.benchmark import processes as benchmark_processes
from scripts.benchmark import report as benchmark_report

ROOT = Path(__file__).parents[2]

SMALL = "--shape small --batch-size 2 --length 8 --threads 1 --device cpu".split()


def run(out, *more, code=0):
    command = [sys.executable, "-m", "scripts.benchmark", *SMALL, "--out", str(out)]
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
    assert record["machine"]["command"].startswith("python -m scripts.benchmark --shape small")
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
    trace = tmp_path / "delta-SAM_RoBERTa_small_cpu_fp32_2_sentences_of_8_tokens.json"
    assert json.loads(trace.read_text())["traceEvents"]
    assert result["threads"] == 1 and ", threads 1" in text
    assert set(result["floors"]["cpu"]) == {"floor of the passes", "SAM + one forward"}
    assert "| delta-SAM / SAM | measured | floor of the passes |" in text


def test_accumulation_and_half_precision(tmp_path):
    """A comparison for each; the peers have neither fp16 nor a say in it."""
    words = ["--update-freq", "1", "2", "--precision", "fp32", "memory-efficient-bf16"]
    words += ["--methods", "Adam", "delta-SAM", "SAM, torch loop", "SAM, davda54", "Adam, fused"]
    words += ["delta-SAM, two forwards"]
    words += ["--davda54", str(tmp_path / "none.py"), "--rounds", "1"]
    run(tmp_path, *words, "--phase-rounds", "0", "--no-memory")
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    settings = [(r["setting"]["precision"], r["setting"]["update_freq"]) for r in results]
    assert settings == [(p, n) for p in ("fp32", "memory-efficient-bf16") for n in (1, 2)]
    assert "half precision" in results[2]["left_out"]["SAM, torch loop"]
    assert "none.py: not a Python file" in results[0]["left_out"]["SAM, davda54"]
    assert "take the loop" in results[2]["left_out"]["Adam, fused"]
    assert "delta-SAM, two forwards" in results[0]["rows"]
    assert "the same program" in results[1]["left_out"]["delta-SAM, two forwards"]
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
    words = ["--processes", "1", "2", "--methods", "Adam", "SAM", "delta-SAM", "SAM, torch loop"]
    text = run(tmp_path, *words, "--rounds", "1", "--no-memory", "--phase-rounds", "1").stdout
    one, two = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert (one["setting"]["processes"], two["setting"]["processes"]) == (1, 2)
    assert "one process" in two["left_out"]["SAM, torch loop"]
    for result, sentences in ((one, 2), (two, 4)):
        row = result["rows"]["Adam"]
        assert row["samples_per_second"] == pytest.approx(sentences / row["seconds"])
    numbers = {"one float64 number", "four float64 numbers", "1000 float64 numbers"}
    assert set(two["reductions"]) == {*numbers, "gradients, float32"}
    assert set(one["floors"]["wall"]) == {"floor of the passes", "SAM + one forward"}
    assert set(two["floors"]["wall"]) == {"SAM + one forward"}
    assert "2 processes" in text and "four float64 numbers" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "SAM, torch loop", "Adam"], "--methods SAM, torch loop"),
        (["--batch-size", "0"], "--batch-size"),
        (["--phase-rounds", "-1"], "--phase-rounds"),
        (["--precision", "fp32", "amp"], "--precision amp"),
        (["--trace", "--processes", "1", "2"], "--trace --processes 2"),
        (["--sweep", "--processes", "2", "4"], "--sweep --processes 2"),
        (["--sweep", "--update-freq", "1", "2"], "--sweep --update-freq 1 2"),
        (["--sweep", "--precision", "fp32", "bf16"], "--sweep --precision fp32 bf16"),
        (["--out", __file__], "test_benchmark.py: a file"),
    ],
)
def test_wrong_options(tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *SMALL, "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_every_process_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """More processes than GPUs are refused; a rank takes its own before anything else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["--out", str(tmp_path), "--device", "cuda", "--processes", "1"]
    parser = benchmark_options.parser("")
    assert not benchmark_options.refusal(parser.parse_args([*words, "2"]))
    refused = benchmark_options.refusal(parser.parse_args([*words, "3"]))
    assert refused.startswith("--processes 3") and refused.endswith("use at most 2")

    def set_device(rank):
        raise InterruptedError(rank)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(InterruptedError, match="1"):
        benchmark.measure_as_rank(parser.parse_args([*words, "2", "--rank", *"1200"]))


def test_the_peak_on_a_gpu_is_of_all_updates(monkeypatch):
    """fairseq's train_step would set it back after each."""
    trainer = types.SimpleNamespace(cuda_env="fairseq's")
    seen = []
    built = benchmark_methods.Built(lambda samples: seen.append(trainer.cuda_env), trainer)
    for name, value in (("empty_cache", 0), ("reset_peak_memory_stats", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10)
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp32", "cuda")
    assert benchmark.peak_memory(lambda: built, setting) == 7
    assert seen == [None] * 3


def test_a_rank_that_dies_ends_the_others(tmp_path):
    """At once, not when a collective gives up; with what the rank said."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "if sys.argv[sys.argv.index('--rank') + 1] == '1':\n"
        "    sys.exit('no memory left')\n"
        "time.sleep(500)\n"
    )
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="of 3 processes failed rank 1: no memory left"):
        benchmark_processes.start(str(program), [], 3)
    assert time.monotonic() - begin < 100


def test_what_fails_is_left_out(tmp_path, monkeypatch, capsys):
    """At building or in the first update; without any method there is an end, with a message."""

    def build(name, *more):
        if name == "SAM":
            raise AssertionError("no CUDA,\n  at all")
        built = benchmark_methods.build(name, *more)
        return built if name == "Adam" and more[0].update_freq == 1 else built._replace(update=fail)

    def fail(samples):
        raise NotImplementedError("half")

    words = ["--methods", "Adam", "SAM", "delta-SAM", "--update-freq", "1", "2", "--rounds", "1"]
    words += ["--no-memory", "--phase-rounds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *SMALL, *words])
    monkeypatch.setattr(benchmark, "build", build)
    monkeypatch.setattr(benchmark.logging, "disable", lambda level: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with warnings.catch_warnings():
        assert benchmark.main() == 1
    assert "2 micro-batches an update: none of --methods can run" in capsys.readouterr().err
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]  # the first stays
    assert list(result["rows"]) == ["Adam"]
    assert result["left_out"] == {
        "SAM": "AssertionError no CUDA, at all",
        "delta-SAM": "NotImplementedError half",
    }


def test_float16_on_a_cpu():
    """fairseq's flat gradients need a GPU."""
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp16", "cpu")
    samples = benchmark_methods.samples_of(setting, 1)
    built = benchmark_methods.build("delta-SAM", setting)
    built.update(samples)
    assert built.trainer.get_num_updates() == 1


def test_versions_of_the_peers(tmp_path):
    """sha256 of nothing begins e3b0c44298fc."""
    (tmp_path / "sam.py").write_text("")
    words = ["--out", str(tmp_path), "--methods", "SAM", "SAM, davda54"]
    args = benchmark_options.parser("").parse_args([*words, "--davda54", str(tmp_path / "sam.py")])
    assert benchmark_machine.peers(args) == {"davda54's sam.py, sha256": "e3b0c44298fc"}


def test_threads_that_differ_stand_in_the_titles():
    setting = benchmark_methods.Setting("small", 2, 8, 1, "fp32", "cpu")
    result = {"setting": setting._asdict(), "base": "Adam", "rows": {}, "memory": {}}
    result.update(left_out={}, phases={}, threads=4)
    record = {"machine": {"command": "c", "cores": 4}, "results": [result, result]}
    assert "cores 4, threads 4" in benchmark_report.markdown(record)
    record["results"][1] = {**result, "threads": 2}
    text = benchmark_report.markdown(record)
    assert "tokens, threads 4**" in text and "tokens, threads 2**" in text


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
    """Forward 1, backward 2, no-grad forward 1: (2 x 3 + 1) / (2 x 3) = 7/6; SAM 8: 9/8."""
    ratios = {"forward": 1.0, "forward without graph": 1.0, "forward and backward": 3.0}
    rows = {name: {"wall_ratio": ratio} for name, ratio in ratios.items()}
    seconds = {name: {"wall": [ratio]} for name, ratio in {**ratios, "SAM": 8.0}.items()}
    cases = (("fp32", 1, 1), ("fp32", 2, 2), ("fp16", 1, 2), ("bf16", 2, 2))
    for precision, update_freq, forwards in cases:
        setting = benchmark_methods.Setting("small", 4, 8, update_freq, precision, "cpu")
        found = benchmark_figures.floors(seconds, rows, setting, "wall")
        with_sam = "SAM + one forward" if forwards == 1 else f"SAM + {forwards} forwards"
        assert found["floor of the passes"] == pytest.approx((6 + forwards) / 6)
        assert found[with_sam] == pytest.approx((8 + forwards) / 8) and len(found) == 2
        several = setting._replace(processes=2)
        assert list(benchmark_figures.floors(seconds, rows, several, "wall")) == [with_sam]
    assert benchmark_figures.of_passes(rows, "wall")["backward"] == 2


def test_spread_by_hand():
    """Quartiles of 1, 2, ..., 7 are 2 and 6."""
    assert benchmark_figures.spread([7, 2, 3, 1, 5, 6, 4]) == 2
    assert benchmark_figures.spread([7]) == 0


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
    row = benchmark_figures.summary(seconds, setting, "Adam")["SAM"]
    assert row["seconds"] == 6 and row["samples_per_second"] == pytest.approx(8 / 6)
    assert row["wall_ratio"] == 2 and row["cpu_ratio"] == 2.5
    assert benchmark_report.title(setting._asdict()).endswith("2 micro-batches an update")
