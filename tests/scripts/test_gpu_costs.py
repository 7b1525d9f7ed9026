"""What the first GPU run asks about costs: a dry run on the CPU, and what a kill leaves."""

import functools
import json
import logging
import multiprocessing
import time
import types

import pytest
import torch

from deltasam_fairseq.core import compiled_rounding
from scripts.benchmark import measure, methods, report
from scripts.gpu import costs

SETTING = methods.Setting("small", 2, 8, 1, "fp32", "cpu")


@pytest.fixture(autouse=True)
def process_as_before():
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    logging.disable(disabled)
    torch.set_float32_matmul_precision(precision)
    costs.initial_model.cache_clear()


def command(folder, seconds):
    words = ["--device", "cpu", "--seconds", str(seconds)]
    words += ["--kit", str(folder / "kit")]
    return [*words, "--work", str(folder / "work"), "--out", str(folder / "out")]


def files(folder):
    record = json.loads((folder / "out/costs.json").read_text())
    return record, (folder / "work/costs.md").read_text()


def test_a_kill_leaves_what_was_measured(tmp_path, monkeypatch):
    """At a moment when one part is done and the next has begun."""
    result = {"precision": "bf16", "seconds to compile": 0, "rows": [], "warnings": ""}
    measurements = {"one": lambda: result, "two": lambda: time.sleep(60), "three": lambda: result}
    plan = [costs.Part(name, 1, run) for name, run in measurements.items()]
    monkeypatch.setattr(costs, "parts", lambda args: plan)
    arguments = (command(tmp_path, 300),)
    process = multiprocessing.get_context("fork").Process(target=costs.main, args=arguments)
    process.start()
    whys, deadline = [], time.monotonic() + 60
    while "not ended" not in whys[1:] and time.monotonic() < deadline:
        if (tmp_path / "out/costs.json").is_file():
            record, _ = files(tmp_path)  # readable at any moment
            whys = [part["why"] for part in record["parts"].values()]
    process.kill()
    process.join()
    record, text = files(tmp_path)
    assert [part["why"] for part in record["parts"].values()] == ["", "not ended", "not reached"]
    assert record["parts"]["one"]["measured"] == result
    assert "- two: not ended\n- three: not reached" in text and "- one" not in text


def test_no_part_begins_that_cannot_end(tmp_path, monkeypatch):
    """10 s are left for parts of 4, 8 and 5 s, and time is spent by imports already."""
    clock, begun = [0.0], []

    def run(seconds):
        begun.append(seconds)
        clock[0] += seconds
        return {"precision": "bf16", "seconds to compile": 0, "rows": [], "warnings": ""}

    plan = [costs.Part(f"of {s} s", s, functools.partial(run, s)) for s in (4, 8, 5)]
    monkeypatch.setattr(costs, "parts", lambda args: plan)
    monkeypatch.setattr(costs.time, "monotonic", lambda: clock[0])
    assert costs.main(command(tmp_path, 12), spent=2.0) == 0
    assert begun == [4, 5]
    _, text = files(tmp_path)
    assert "- of 8 s: not begun, would take 8 s of the 6 s left" in text
    begun.clear()
    assert costs.main(command(tmp_path, 1)) == 1 and not begun


def test_a_part_that_fails_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA error:\nno kernel image")

    def succeed():
        return {"precision": "bf16", "seconds to compile": 0, "rows": [], "warnings": "no gcc"}

    plan = [costs.Part("one", 1, fail), costs.Part("two", 1, succeed)]
    monkeypatch.setattr(costs, "parts", lambda args: plan)
    assert costs.main(command(tmp_path, 60)) == 0
    _, text = files(tmp_path)
    assert "- one: failed, RuntimeError: CUDA error: no kernel image" in text
    assert "Not compiled (bf16): no gcc." in text
    assert "no kernel image" in capsys.readouterr().err


def test_bounds_by_hand():
    """SAM 2.1 of Adam, above its bound; delta-SAM 1.3 of SAM, above that of one forward only."""
    seconds = {"Adam": 10.0, "SAM": 21.0, "delta-SAM": 27.3, "forward": 1.0}
    seconds.update({"forward without graph": 1.0, "forward and backward": 3.0})
    found = {name: {"wall": [s], "cpu": [s]} for name, s in seconds.items()}
    result = {"setting": SETTING._asdict(), "base": "Adam", "seconds_of_all_rounds": found}
    sam, delta = costs.bars(report.add_figures(result))
    assert sam["measured"] == pytest.approx(2.1) and not sam["met"]
    assert delta["measured"] == pytest.approx(1.3) and not delta["met"]
    assert delta["floor of the passes"] == pytest.approx(7 / 6)
    result["setting"] = SETTING._replace(precision="fp16")._asdict()
    assert costs.bars(report.add_figures(result))[1]["met"]


def test_copies_of_a_model_are_independent():
    """An update of one method leaves the weights of the others and of the model alone."""
    model = costs.initial_model("small", "cpu")
    start = [p.detach().clone() for p in model.parameters()]
    one, two = (methods.build("SAM", SETTING, model=model) for _ in range(2))
    one.update(methods.random_batches(SETTING, 1))
    pairs = zip(start, model.parameters(), two.trainer.get_model().parameters())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in pairs)
    moved = zip(start, one.trainer.get_model().parameters())
    assert any(not torch.equal(a, b) for a, b in moved)


def test_work_of_the_gpu_by_hand(monkeypatch):
    """Two kernels of 30 and 20 us; the processor's calls and marks do not count."""

    def event(name, microseconds, device, mark=False):
        span = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(
            name=name, device_type=device, time_range=span, is_user_annotation=mark
        )

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("gemm", 30, cuda), event("add", 20, cuda), event("cudaLaunchKernel", 9, cpu)]
    events += [event("sam-forward", 50, cuda), event("Optimizer.step", 70, cuda, mark=True)]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done = measure.device_work(lambda: None)
    assert done == {"seconds": pytest.approx(50e-6), "kernels": 2}
    events.clear()
    assert measure.device_work(lambda: None) is None


def test_rounding_that_is_not_compiled_says_why(monkeypatch):
    """One row, in which both ways are the plain operations."""

    def compile(kernel):
        raise RuntimeError("no C compiler here")

    compiled_rounding._compile_and_check.cache_clear()
    monkeypatch.setattr(compiled_rounding, "_compile", compile)
    result = costs.compare_rounding("cpu", "bf16", ["small", "base"])
    compiled_rounding._compile_and_check.cache_clear()
    assert "no C compiler here" in result["warnings"] and len(result["rows"]) == 1
    assert "Not compiled (bf16): stochastic rounding is not" in costs.rounding_table([result])
