"""How the GPU benchmarks compare steps: errors stay with their method, and the parts run to their end on the CPU."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from benchmarks.gpu import cost, llama
from gradsel.experiments.cost import comparing, contenders, methods, vit
from gradsel.experiments.cost.timing import DeviceLost
from gradsel.papers.vit import VisionTransformer


def context(seconds: float = 600) -> comparing.Alone:
    return comparing.Alone("cpu", True, time.monotonic() + seconds)


def lines(rows):
    return {(row["operation"], row["size"], row["dtype"], row["method"], row["k"]): row for row in rows}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Threads of so small products mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(comparing, "WARM_UP", 1)
    monkeypatch.setattr(comparing, "FEWEST", 2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", [cost, llama], ids=["cost", "llama"])
def test_part_emits_a_line_for_everything(part, monkeypatch):
    monkeypatch.setattr(comparing, "peak_bytes", lambda start, cuda: 7)
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
        assert row["peak_bytes"] == 7
    named = {row["method"] for row in rows}
    if part is cost:
        every = methods.for_vit(vit.task_of(lambda *args: None), torch.float32)
        assert {method.name for method in every} <= named
        assert {(row["operation"], row["dtype"]) for row in rows} == {
            (operation, dtype) for operation in ("training step", "inference") for dtype in ("float32", "bfloat16")
        }
        assert {"LoRA, merged", "SSF, merged", "GPS, detached", "LoRA, bfloat16 adapters"} <= named
    else:
        assert {"GPS", "GPS, attached", "LoRA", "full fine-tuning", "GRFT rows", "LoRA, checkpointed"} <= named


def test_memory_on_a_cpu_is_that_of_tensors_at_the_peak_of_a_call():
    """Twice 4 MB are kept from the start; a call needs twice 8 MB at once, and 12 MB one after the other."""

    def start():
        kept = [torch.zeros(1 << 20), torch.zeros(1 << 20)]

        def run():
            first = torch.zeros(1 << 21) + kept[0].sum()  # two of 8 MB for a moment
            del first
            torch.zeros(3 << 20)

        return contenders.Running(run, {})

    assert comparing.peak_bytes(start, cuda=False) == pytest.approx(24 << 20, rel=0.001)


def test_full_fine_tuning_needs_gradients_and_moments_of_all_weights(monkeypatch):
    wanted = ("full fine-tuning", "GPS, attached", "LoRA")
    every = vit.for_vit
    monkeypatch.setattr(vit, "for_vit", lambda *a: [each for each in every(*a, (1,)) if each.name in wanted])
    monkeypatch.setattr(vit, "PRETRAINING", 1)
    prepared = functools.cache(lambda: vit.model_and_selections("cpu", vit.TOY, None))
    training = vit.comparisons(context(), prepared)[0]
    peaks = {row["method"]: row["peak_bytes"] for row in training.measure(context())}
    weights = 4 * sum(parameter.numel() for parameter in VisionTransformer(num_classes=100, **vit.TOY).parameters())
    assert peaks["full fine-tuning"] > 4 * weights
    assert weights < peaks["GPS, attached"] < peaks["full fine-tuning"] - 2 * weights


SHARED = {"part": "p", "operation": "o", "size": "s", "dtype": "d"}


def entries(**starts):
    return [contenders.Entry(name, 0, start) for name, start in starts.items()]


def working():
    return contenders.Running(lambda: torch.ones(100).sum(), {})


def broken():
    raise RuntimeError("no memory\nleft")


def test_one_error_does_not_stop_the_rest():
    def fails_later():
        calls = iter([1, 1, 1])
        return contenders.Running(lambda: next(calls), {})

    some = entries(good=working, broken=broken, late=fails_later)
    rows = comparing.Comparison(SHARED, some, calls=2, seconds=0, baseline="good").measure(context())
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
    assert comparing.kernels(working().run) == {}
    monkeypatch.setattr(comparing, "kernels", lambda run: {"kernels": 7})
    return comparing.Alone("cuda", True, time.monotonic() + 600)


def test_on_a_gpu_memory_is_measured_first(pretended_gpu):
    some = entries(one=working, two=working)
    rows = comparing.Comparison(SHARED, some, calls=2, seconds=0, baseline="one").measure(pretended_gpu)
    assert [row["peak_bytes"] for row in rows] == [50, 150]
    assert all(float(row["p50_ms"]) > 0 and float(row["wall_p50_ms"]) > 0 for row in rows)
    assert [row["method"] for row in pretended_gpu.rows] == ["one", "two"] * 2  # with the kernels' time later
    assert [row["extra"] for row in rows] == ["kernels=7"] * 2


def test_a_lost_device_ends_the_part(pretended_gpu):
    some = entries(one=working, broken=broken, two=working)
    with pytest.raises(DeviceLost):  # there is no CUDA device to be found in order
        comparing.Comparison(SHARED, some, calls=2, seconds=0, baseline="one").measure(pretended_gpu)
    assert [row["method"] for row in pretended_gpu.rows] == ["broken"]


def test_what_is_done_is_measured_again_only_for_comparison():
    lent = context()
    lent.done = lambda row: row["method"] != "new"
    some = entries(baseline=working, old=working, new=working)
    comparison = comparing.Comparison(SHARED, some, calls=1, seconds=0, baseline="baseline")
    rows = comparison.measure(lent)
    assert [row["method"] for row in rows] == ["baseline", "new"]
    lent.done = lambda row: True
    assert comparison.measure(lent) == []


@pytest.mark.parametrize("part", [cost, llama], ids=["cost", "llama"])
def test_nothing_is_made_when_nothing_is_left_to_do(part, monkeypatch):
    monkeypatch.setattr(vit, "model_and_selections", lambda *args: pytest.fail("made"))
    monkeypatch.setattr(llama, "llama", lambda *args: pytest.fail("made"))
    assert part.run(context(-1)) == []
    lent = context()
    lent.done = lambda row: True
    assert part.run(lent) == []


def test_cost_says_first_that_losses_differ(monkeypatch):
    """And measures on: minutes on a GPU are dear, and the other methods are as they are."""
    monkeypatch.setattr(vit, "check", lambda *args: "losses differ")
    monkeypatch.setattr(vit.Comparison, "measure", lambda self, context: [])
    (row,) = cost.run(context())
    assert (row["method"], row["k"], row["extra"]) == ("ours against as published", 1, "error: losses differ")
