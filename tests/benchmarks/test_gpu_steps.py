"""How the GPU benchmarks compare steps: errors stay with their method, and the parts run to their end on the CPU."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.gpu import cost, llama
from benchmarks.harness.clock import DeviceLost
from benchmarks.training import baselines, models, steps


def context(seconds: float = 600) -> steps.Alone:
    return steps.Alone("cpu", True, time.monotonic() + seconds)


def lines(rows):
    return {(row["operation"], row["size"], row["dtype"], row["method"], row["k"]): row for row in rows}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Threads of so small products mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(steps, "FEWEST", 2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", [cost, llama], ids=["cost", "llama"])
def test_part_emits_a_line_for_everything(part):
    lent = context()
    rows = part.run(lent)
    assert rows == lent.rows
    assert len(lines(rows)) == len(rows)  # the key tells them apart
    assert not [row for row in rows if "error" in row["extra"]]
    for row in rows:
        assert row["part"] == part.__name__.rpartition(".")[2]
        assert float(row["p20_ms"]) > 0
        assert float(row["p50_ms"]) > 0
        assert row["repeats"] == 2
    named = {row["method"] for row in rows}
    if part is cost:
        methods = baselines.for_vit(cost.task_of(lambda *args: None), torch.float32)
        assert {method.name for method in methods} <= named
        assert {(row["operation"], row["dtype"]) for row in rows} == {
            (operation, dtype) for operation in ("training step", "inference") for dtype in ("float32", "bfloat16")
        }
        assert {"LoRA, merged", "SSF, merged", "GPS, detached", "LoRA, bfloat16 adapters"} <= named
    else:
        assert {"GPS", "GPS, attached", "LoRA", "full fine-tuning", "GRFT rows", "LoRA, checkpointed"} <= named


SHARED = {"part": "p", "operation": "o", "size": "s", "dtype": "d"}


def entries(**starts):
    return [models.Entry(name, 0, start) for name, start in starts.items()]


def working():
    return models.Running(lambda: torch.ones(100).sum(), {})


def broken():
    raise RuntimeError("no memory\nleft")


def test_one_error_does_not_stop_the_rest():
    def fails_later():
        calls = iter([1, 1, 1])
        return models.Running(lambda: next(calls), {})

    some = entries(good=working, broken=broken, late=fails_later)
    rows = steps.Comparison(SHARED, some, calls=2, seconds=0, baseline="good").measure(context())
    found = {row["method"]: row for row in rows}
    assert found["good"]["speedup"] == "1"
    assert found["broken"]["extra"] == "error: RuntimeError: no memory"
    assert found["late"]["extra"].startswith("error: StopIteration")
    assert len(rows) == 3


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What is called on a GPU, as far as that can be seen without one."""
    held = iter(range(100, 10000, 100))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
    assert steps.kernels(working().run) == {}
    monkeypatch.setattr(steps, "kernels", lambda run: {"kernels": 7})
    return steps.Alone("cuda", True, time.monotonic() + 600)


def test_on_a_gpu_memory_is_measured_first(pretended_gpu):
    some = entries(one=working, two=working)
    rows = steps.Comparison(SHARED, some, calls=2, seconds=0, baseline="one").measure(pretended_gpu)
    assert [row["peak_bytes"] for row in rows] == [50, 150]
    assert all(float(row["p50_ms"]) > 0 and float(row["wall_p50_ms"]) > 0 for row in rows)
    assert [row["method"] for row in pretended_gpu.rows] == ["one", "two"] * 2  # with the kernels' time later
    assert [row["extra"] for row in rows] == ["kernels=7"] * 2


def test_a_lost_device_ends_the_part(pretended_gpu):
    some = entries(one=working, broken=broken, two=working)
    with pytest.raises(DeviceLost):  # there is no CUDA device to be found in order
        steps.Comparison(SHARED, some, calls=2, seconds=0, baseline="one").measure(pretended_gpu)
    assert [row["method"] for row in pretended_gpu.rows] == ["broken"]


def test_what_is_done_is_measured_again_only_for_comparison():
    lent = context()
    lent.done = lambda row: row["method"] != "new"
    some = entries(baseline=working, old=working, new=working)
    comparison = steps.Comparison(SHARED, some, calls=1, seconds=0, baseline="baseline")
    rows = comparison.measure(lent)
    assert [row["method"] for row in rows] == ["baseline", "new"]
    lent.done = lambda row: True
    assert comparison.measure(lent) == []


@pytest.mark.parametrize("part", [cost, llama], ids=["cost", "llama"])
def test_nothing_is_made_when_nothing_is_left_to_do(part, monkeypatch):
    monkeypatch.setattr(cost, "model_and_selections", lambda *args: pytest.fail("made"))
    monkeypatch.setattr(llama, "llama", lambda *args: pytest.fail("made"))
    assert part.run(context(-1)) == []
    lent = context()
    lent.done = lambda row: True
    assert part.run(lent) == []


def test_cost_says_first_that_losses_differ(monkeypatch):
    """And measures on: minutes on a GPU are dear, and the other methods are as they are."""
    monkeypatch.setattr(cost, "check", lambda *args: "losses differ")
    monkeypatch.setattr(cost.Comparison, "measure", lambda self, context: [])
    (row,) = cost.run(context())
    assert (row["method"], row["k"], row["extra"]) == ("ours against as published", 1, "error: losses differ")
