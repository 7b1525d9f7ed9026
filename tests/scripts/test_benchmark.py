"""The benchmark runs, and its figures are those of the clock."""

import contextlib
import functools
import json
import logging
import signal
import subprocess
import sys
import time
import types
import unittest.mock

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import ascent_quality, criterion_cost, measure, methods, report
from tests.helpers import tiny

SMALL = "--shape small --batch-size 2 --length 8 --threads 1 --device cpu".split()
SETTING = methods.Setting("small", 2, 8, 1, "fp32", "cpu")


@pytest.fixture
def run(tmp_path, capsys):
    """Run the program in this process; return what it prints."""
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable

    def run(*more, code=0):
        assert benchmark.main([*SMALL, "--out", str(tmp_path), *more]) == code
        return capsys.readouterr()

    yield run
    torch.set_num_threads(threads)
    logging.disable(disabled)


def words_of(text):
    """Without the padding of table columns."""
    return " ".join(text.split())


def test_report(tmp_path, run):
    """Every method is in the report; one that cannot run here is named with the reason."""
    names = ["Adam", "SAM", "delta-SAM", "delta-SAM, two forwards", *methods.OTHER_SAMS]
    words = ["--methods", *names, "--rounds", "2", "--phase-rounds", "1", "--trace"]
    text = run(*words).out
    assert text.strip() == (tmp_path / "benchmark.md").read_text().strip()
    record = json.loads((tmp_path / "benchmark.json").read_text())
    (result,) = record["results"]
    assert record["machine"]["command"].startswith("python -m scripts.benchmark --shape small")
    assert "--davda54 FILE" in result["unavailable"]["SAM, davda54"]
    assert set(names) == set(result["rows"]) | set(result["unavailable"])
    assert all(f"| {name}" in text for name in result["rows"])
    assert all(f"{name} ({why})" in text for name, why in result["unavailable"].items())
    row = result["rows"]["Adam"]
    assert row["wall_ratio"] == 1
    assert row["samples_per_second"] == pytest.approx(2 / row["seconds"])
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
    assert "| delta-SAM / SAM | measured | floor of the passes |" in words_of(text)


def test_accumulation_and_half_precision(tmp_path, run):
    """A comparison for each."""
    words = ["--update-freq", "1", "2", "--precision", "fp32", "memory-efficient-bf16"]
    words += ["--methods", "delta-SAM", "SAM, davda54", "--davda54", str(tmp_path / "none.py")]
    run(*words, "--rounds", "1", "--phase-rounds", "0", "--no-memory")
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    settings = [(r["setting"]["precision"], r["setting"]["update_freq"]) for r in results]
    assert settings == [(p, n) for p in ("fp32", "memory-efficient-bf16") for n in (1, 2)]
    assert all("delta-SAM" in result["rows"] for result in results)
    assert "none.py: not a Python file" in results[0]["unavailable"]["SAM, davda54"]
    assert "half precision" in results[2]["unavailable"]["SAM, davda54"]
    assert not results[0]["phases"] and not results[0]["memory"]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("SAM, torch loop", {"precision": "bf16"}, "other SAMs have no half precision"),
        ("SAM, torch loop", {"processes": 2}, "one process"),
        ("SAM, davda54", {}, "give --davda54 FILE"),
        ("Adam, fused", {"precision": "memory-efficient-bf16"}, "take the loop"),
        ("delta-SAM, two forwards", {"update_freq": 2}, "itself has two forwards"),
    ],
)
def test_methods_say_why_they_are_unavailable(name, change, message):
    with pytest.raises(methods.MethodUnavailable, match=message):
        methods.build(name, SETTING._replace(**change))


def test_the_torch_loop_is_sam():
    """Without dropout it goes where sam_adam goes, so that equal things are timed."""
    setting = methods.Setting("small", 4, 8, 2, "fp32", "cpu")
    sam = methods.build("SAM", setting)
    loop = methods.build("SAM, torch loop", setting)
    for built in (sam, loop):
        for module in built.trainer.get_model().modules():
            for name in ("p", "dropout", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        for parameter_group in built.trainer.optimizer.param_groups:
            parameter_group["lr"] = 1e-5
    start = [p.detach().clone() for p in sam.trainer.get_model().parameters()]
    for seed in range(3):
        samples = methods.random_batches(setting, 2, seed)
        sam.update(samples)
        loop.update(samples)
    pairs = zip(sam.trainer.get_model().parameters(), loop.trainer.get_model().parameters(), start)
    moved = difference = 0.0
    for one, other, own in pairs:
        moved += (one - own).square().sum().item()
        difference += (one - other).square().sum().item()
    assert 0 < difference < 0.05 * moved or difference == 0


def test_two_processes(tmp_path):
    """As a user runs it: twice the sentences an update; all-reduces are timed by themselves."""
    words = ["--processes", "1", "2", "--methods", "SAM", "delta-SAM", "SAM, torch loop"]
    words += ["--rounds", "1", "--no-memory", "--phase-rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "scripts.benchmark", *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert (one["setting"]["processes"], two["setting"]["processes"]) == (1, 2)
    assert "one process" in two["unavailable"]["SAM, torch loop"]
    assert done.stderr.count("SAM, torch loop: unavailable") == 1  # said by rank 0 only
    for result, sentences in ((one, 2), (two, 4)):
        row = result["rows"]["SAM"]
        assert row["samples_per_second"] == pytest.approx(sentences / row["seconds"])
    numbers = {"one float64 number", "four float64 numbers", "1000 float64 numbers"}
    assert set(two["reductions"]) == {*numbers, "gradients, float32"}
    assert set(one["floors"]["wall"]) == {"floor of the passes", "SAM + one forward"}
    assert set(two["floors"]["wall"]) == {"SAM + one forward"}
    assert "2 processes" in done.stdout and "four float64 numbers" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "SAM, torch loop", "Adam"], "--methods SAM, torch loop"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--rounds", "ten"], "--rounds: invalid int value: 'ten'"),
        (["--phase-rounds", "-1"], "--phase-rounds: must be at least 0, got -1"),
        (["--precision", "fp32", "amp"], "--precision amp"),
        (["--trace", "--processes", "1", "2"], "--trace --processes 2"),
        (["--sweep", "--processes", "2", "4"], "--sweep --processes 2"),
        (["--sweep", "--update-freq", "1", "2"], "--sweep --update-freq 1 2"),
        (["--sweep", "--precision", "fp32", "bf16"], "--sweep --precision fp32 bf16"),
        (["--out", __file__], "test_benchmark.py: a file"),
    ],
)
def test_wrong_options(tmp_path, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*SMALL, "--out", str(tmp_path), *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_every_process_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """More processes than GPUs are refused; a rank takes its own before anything else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["--out", str(tmp_path), "--device", "cuda", "--processes", "1"]
    parser = benchmark.parser()
    assert not benchmark.refusal(parser.parse_args([*words, "2"]))
    refused = benchmark.refusal(parser.parse_args([*words, "3"]))
    assert refused.startswith("--processes 3") and refused.endswith("use at most 2")

    def set_device(rank):
        raise InterruptedError(rank)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setenv("RANK", "1")
    args = parser.parse_args([*words, "2"])
    with pytest.raises(InterruptedError, match="1"):
        measure.measure_rank(args, benchmark.settings_of(args)[-1])


def test_the_peak_on_a_gpu_is_of_all_updates(monkeypatch):
    """fairseq's train_step would reset it after each."""
    trainer = types.SimpleNamespace(cuda_env="its own")
    seen = []
    built = methods.Built(lambda samples: seen.append(trainer.cuda_env), trainer)
    for name, value in (("empty_cache", 0), ("reset_peak_memory_stats", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10)
    on_a_gpu = SETTING._replace(device="cuda")
    assert measure.build_and_measure_memory(lambda: built, on_a_gpu) == (built, 7)
    assert seen == [None] * 3 and trainer.cuda_env == "its own"


def test_a_rank_that_dies_ends_the_others():
    """At once, not when a collective gives up; with what the rank said."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    program = (
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise MemoryError('no memory left')\n"
        "time.sleep(500)\n"
    )
    begin = time.monotonic()
    try:
        with pytest.raises(ChildFailedError, match="(?s)rank *: 1 .*MemoryError: no memory left"):
            measure.run_in_processes(exec, 3, program)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert time.monotonic() - begin < 100


def test_a_rank_that_fails_is_reported(tmp_path, run, monkeypatch):
    """With exit code 1."""

    def fail(args, setting):
        raise ChildFailedError("measure_rank", {0: unittest.mock.MagicMock()})

    monkeypatch.setattr(benchmark, "measure", fail)
    assert "python -m scripts.benchmark: \n=" in run("--processes", "2", code=1).err


def test_methods_that_fail_are_unavailable(tmp_path, monkeypatch, run):
    """At building or in the first update; without any method it ends, with a message."""

    def build(name, *more):
        if name == "SAM":
            raise AssertionError("no CUDA,\n  at all")
        built = methods.build(name, *more)
        return built if name == "Adam" and more[0].update_freq == 1 else built._replace(update=fail)

    def fail(samples):
        raise NotImplementedError("half")

    words = ["--methods", "Adam", "SAM", "delta-SAM", "--update-freq", "1", "2", "--rounds", "1"]
    monkeypatch.setattr(measure, "build", build)
    err = run(*words, "--no-memory", "--phase-rounds", "0", code=1).err
    assert "2 micro-batches an update: none of --methods can run" in err
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]  # the first stays
    assert list(result["rows"]) == ["Adam"]
    assert result["unavailable"] == {
        "SAM": "AssertionError no CUDA, at all",
        "delta-SAM": "NotImplementedError half",
    }


def test_float16_on_a_cpu():
    """fairseq's flat gradients need a GPU."""
    setting = SETTING._replace(precision="fp16")
    built = methods.build("delta-SAM", setting)
    built.update(methods.random_batches(setting, 1))
    assert built.trainer.get_num_updates() == 1


def test_versions_of_other_sams(tmp_path):
    """sha256 of nothing begins e3b0c44298fc."""
    (tmp_path / "sam.py").write_text("")
    words = ["--out", str(tmp_path), "--methods", "SAM", "SAM, davda54"]
    args = benchmark.parser().parse_args([*words, "--davda54", str(tmp_path / "sam.py")])
    assert report.peer_versions(args) == {"davda54's sam.py, sha256": "e3b0c44298fc"}


def test_threads_that_differ_stand_in_the_titles():
    result = {"setting": SETTING._asdict(), "base": "Adam", "rows": {}, "memory": {}}
    result.update(unavailable={}, phases={}, threads=4)
    record = {"machine": {"command": "c", "cores": 4}, "results": [result, result]}
    assert "cores 4, threads 4" in report.markdown(record)
    record["results"][1] = {**result, "threads": 2}
    text = report.markdown(record)
    assert "tokens, threads 4**" in text and "tokens, threads 2**" in text


def test_every_rank_has_sentences_of_its_own():
    """Four updates of two ranks are eight batches."""
    setting = SETTING._replace(processes=2)
    found = [
        methods.random_batches(setting._replace(rank=rank), 1, seed)[0]["net_input"]
        for rank in range(2)
        for seed in range(4)
    ]
    assert len({tuple(each["src_tokens"].flatten().tolist()) for each in found}) == 8


def test_the_paper_s_second_forward_counts_as_one():
    """Of delta-SAM with two forwards: not as preparation."""
    built = methods.build(methods.TWO_FORWARDS, SETTING)
    built.update(methods.random_batches(SETTING, 1))  # the first one checks the criterion too
    marks = []

    def mark(name, args=None):
        marks.append(name)
        return contextlib.nullcontext()

    with unittest.mock.patch.object(torch.autograd.profiler, "record_function", mark):
        built.update(methods.random_batches(SETTING, 1))
    assert marks.count("sam-forward-nograd") == 2


def test_a_sweep_is_drawn(tmp_path):
    """Numbers are on the axis by size, not by the time that each took; shapes by time."""
    results = []
    for change in ({"length": 64}, {"length": 16}, {"length": 128}, {"shape": "base"}):
        setting = SETTING._replace(**{"length": 64, **change})
        rows = {name: {"seconds": 1.0} for name in ("Adam", "SAM")}
        results.append({"setting": setting._asdict(), "rows": rows, "base": "Adam"})
    lengths = sorted(results[:3], key=functools.partial(report.axis_position, "length"))
    assert [r["setting"]["length"] for r in lengths] == [16, 64, 128]
    assert report.axis_position("shape", results[3]) == 1.0
    report.plot_sweep({"results": results}, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_phases_by_hand(monkeypatch):
    """Inner phases do not count for outer ones; operations and foreign marks do."""
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    @contextlib.contextmanager
    def taking(name, seconds):
        """A mark with so much of its own, half before and half after what is inside."""
        with torch.autograd.profiler.record_function(name):
            clock[0] += seconds / 2
            yield
            clock[0] += seconds / 2

    def update():
        clock[0] += 10
        with taking("sam-ascent", 5), taking("not ours", 2), taking("forward", 1):
            clock[0] += 3  # an operation
        with taking("sam-restore", 10):
            pass

    found = measure.phases(update, 2, "cpu")
    assert found == pytest.approx(
        {"forward": 4, "restore": 10, "rest of the ascent": 11 - 4, measure.REST: 31 - 11 - 10}
    )


def test_phases_are_those_of_the_clock():
    """Two updates: 20 ms in a forward inside the ascent, 10 ms in the ascent, 30 ms outside."""

    def update():
        with torch.autograd.profiler.record_function("sam-ascent"):
            time.sleep(0.01)
            with torch.autograd.profiler.record_function("sam-forward"):
                time.sleep(0.02)
        time.sleep(0.03)

    own = torch.autograd.profiler.record_function
    begin = time.perf_counter()
    found = measure.phases(update, 2, "cpu")
    most = (time.perf_counter() - begin) / 2
    assert torch.autograd.profiler.record_function is own
    assert list(found) == ["forward", "rest of the ascent", measure.REST]
    for name, least in (("forward", 0.02), ("rest of the ascent", 0.01), (measure.REST, 0.03)):
        assert least <= found[name] < least + most - 0.06
    assert sum(found.values()) < most


def test_phases_wait_for_a_gpu(monkeypatch):
    """At both ends of every mark, so that its work is in it."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(0))

    def update():
        with torch.autograd.profiler.record_function("forward"):
            pass

    measure.phases(update, 3, "cuda")
    assert len(waits) == 3 * 2 * 2  # the update is a mark, too


def test_floor_by_hand():
    """Forward 1, backward 2, no-grad forward 1: (2 x 3 + 1) / (2 x 3) = 7/6; SAM 8: 9/8."""
    ratios = {"forward": 1.0, "forward without graph": 1.0, "forward and backward": 3.0}
    rows = {name: {"wall_ratio": ratio} for name, ratio in ratios.items()}
    seconds = {name: {"wall": [ratio]} for name, ratio in {**ratios, "SAM": 8.0}.items()}
    cases = (("fp32", 1, 1), ("fp32", 2, 2), ("fp16", 1, 2), ("bf16", 2, 2))
    for precision, update_freq, forwards in cases:
        setting = methods.Setting("small", 4, 8, update_freq, precision, "cpu")
        found = report.floors(seconds, rows, setting, "wall")
        with_sam = "SAM + one forward" if forwards == 1 else f"SAM + {forwards} forwards"
        assert found["floor of the passes"] == pytest.approx((6 + forwards) / 6)
        assert found[with_sam] == pytest.approx((8 + forwards) / 8) and len(found) == 2
        several = setting._replace(processes=2)
        assert list(report.floors(seconds, rows, several, "wall")) == [with_sam]
    assert report.in_forwards(rows, "wall")["backward"] == 2


def test_spread_by_hand():
    """Quartiles of 1, 2, ..., 7 are 2 and 6."""
    assert report.spread([7, 2, 3, 1, 5, 6, 4]) == 2
    assert report.spread([7]) == 0


def test_updates_that_are_not_alike_are_timed_together(monkeypatch):
    """With --sam-every 2, one with and one without an ascent, 3 s and 1 s: 2 s an update."""
    clock, made = [0.0], []

    def update(samples):
        made.append(samples)
        clock[0] += 3 if len(made) % 2 else 1

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure.timed(update, 2, [], "cpu")["wall"] == 2
    found = measure.time_in_turn({"every 2nd": update}, [[]], 3, "cpu", {"every 2nd": 2})
    assert found["every 2nd"]["wall"] == [2, 2, 2] and len(made) == 2 + 2 * (2 + 3)
    assert methods.build("SAM, every 2nd", SETTING).period == 2


def test_summary_by_hand():
    setting = methods.Setting("small", 4, 8, 2, "fp32", "cpu")
    seconds = {
        "Adam": {"wall": [1.0, 2.0, 4.0], "cpu": [1.0, 1.0, 1.0]},
        "SAM": {"wall": [2.0, 6.0, 8.0], "cpu": [2.0, 2.5, 3.0]},
    }
    row = report.summary(seconds, setting, "Adam")["SAM"]
    assert row["seconds"] == 6 and row["samples_per_second"] == pytest.approx(8 / 6)
    assert row["wall_ratio"] == 2 and row["cpu_ratio"] == 2.5
    assert setting.title.endswith("2 micro-batches an update")


def table_of(program, data, words, monkeypatch, capsys):
    """The cells of the table that a program prints of the tiny data, without the header."""
    disabled = logging.root.manager.disable
    argv = [str(data), *tiny.MODEL, *"--num-classes 2 --lr 1e-3 --batch-size 8".split(), *words]
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    try:
        program.main()
    finally:
        logging.disable(disabled)
    header, line, *rows = capsys.readouterr().out.strip().splitlines()
    assert set(line) <= set("|- ")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_cost_of_criterions(classification, monkeypatch, capsys):
    """Every criterion with every optimizer, and the ratio to the plain one's."""
    words = ["--criterions", "r_drop", "--optimizers", "adam", "sam_adam", "--rounds", "3"]
    rows = table_of(criterion_cost, classification, words, monkeypatch, capsys)
    assert [row[0] for row in rows] == ["sentence_prediction", "r_drop"]
    assert all(cell.endswith("(1.00)") for cell in rows[0][1:])
    assert all(float(cell.split("(")[1].strip(")")) > 0 for cell in rows[1][1:])


def test_quality_of_cheaper_ascents(classification, monkeypatch, capsys):
    """What is left of the rise: all of SAM's, and as much where ascent steps are fewer."""
    ways = ("Adam", "SAM", "SAM, every 5th update", "SAM, layer normalisations only")
    monkeypatch.setattr(ascent_quality, "WAYS", {w: ascent_quality.WAYS[w] for w in ways})
    words = ["--rounds", "5", "--warm", "3"]
    rows = table_of(ascent_quality, classification, words, monkeypatch, capsys)
    assert [row[0] for row in rows] == list(ways)
    assert [row[3] for row in rows[:3]] == ["-", "1.00", "1.00"] and float(rows[3][3]) < 0.9
    assert rows[0][2] == "1.00" and all(float(row[2]) > 0 for row in rows)
