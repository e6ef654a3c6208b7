"""How calls are timed and watched on a device: in an order drawn anew in every round, and telling when it is lost."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

Function = Callable[[], object]
T = TypeVar("T")
#: How the remark on what could not be measured begins.
ERROR = "error: "


class DeviceLost(RuntimeError):
    """The device refuses everything in this process from now on, for example after an illegal address."""


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def shuffled(names: Iterable[T], seed: int = 0) -> Iterator[list[T]]:
    """The same names in another order each time, without end."""
    order, generator = list(names), random.Random(seed)
    while True:
        generator.shuffle(order)
        yield list(order)


def time_calls(run: Function, calls: int = 1, cuda: bool = False) -> tuple[float, float]:
    """Seconds of one of several calls in a row: on the device's clock from the first kernel to the last, and on the
    wall clock. On the CPU both are the same."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wall = (time.perf_counter() - start) / calls
        return wall, wall
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls, (time.perf_counter() - start) / calls


def check_device() -> None:
    """
    Raises:
        DeviceLost: the current device can run nothing else in this process.
    """
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
        torch.cuda.empty_cache()  # refused for good after some captures that failed
    except Exception as error:
        raise DeviceLost(first_line(error)) from None


def release() -> None:
    """Frees what nothing refers to any more."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # a lost device is reported elsewhere
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def on_the_device(function: Function) -> list[Any]:
    """The profiler's events of what a call does on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    events = list(profile.events())
    of_host = {event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU}
    return [  # annotations are named after what the host did, and overlap with the kernels they annotate
        event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in of_host
    ]


def peak_recorded(recorded: Any, since: str | None = None) -> int | None:
    """The most bytes that tensors took, of those that were made while torch's profiler watched the CPU's memory.

    Args:
        recorded: ``profiler.profiler.kineto_results``.
        since: the name of a range (``record_function``) from whose beginning on the peak counts; None: from the start.

    Returns:
        None if the range is not there.
    """
    held = 0
    peak = 0 if since is None else None
    for event in sorted(recorded.events(), key=lambda event: event.start_ns()):
        if event.name() == since:
            peak = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = None if peak is None else max(peak, held)
    return peak


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def rounded(number: float | None) -> str:
    """A number for a results file; nothing where there is none."""
    return "" if number is None else f"{number:.4g}"
