"""The clock: device time of short calls, interleaved, from memory rather than from a cache.

A call of a few microseconds takes longer to launch than to run, so device time is taken where the host is ahead of the
device, by one of these methods:

- ``graph``: a CUDA graph of many copies of the call, replayed between two events;
- ``queued``: the calls are put behind a kernel that only waits, so that the device finds all of them ready; for what
  cannot be captured and for what takes long;
- ``cold``: one call at a time, queued likewise, after the second-level cache has been flushed; for optimizer steps,
  between which a training loop runs forward and backward. The two events add one or two microseconds;
- ``wall``: the wall clock, on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from clock import Clock, DeviceLost, Function, first_line
from common import percentiles

import gradsel_kernels as gk

#: Device time of one sample, for the sake of the events' resolution; a graph is captured for calls shorter than that.
SAMPLE_SECONDS = 1e-3
#: Seconds from which on a call is done once a sample, and seldom.
SLOW = 0.02


@dataclass
class Call:
    """One way of doing the work that is compared.

    Attributes:
        functions: the same call on different inputs, done in turn.
        moved: bytes that it has to read and write.
        backend: of gradsel_kernels; None: the one in use anyway.
        graph: it may be captured.
        cold: it is to find nothing in the cache that the call before has left.
        wall: the time on the host counts too.
        extra: for the results file.
    """

    functions: Sequence[Function]
    moved: int = 0
    backend: str | None = None
    graph: bool = True
    cold: bool = False
    wall: bool = False
    extra: str = ""


@dataclass
class Timing:
    """Seconds of one call."""

    method: str
    p20: float
    p50: float
    p80: float
    wall: float | None
    repeats: int


class Sampler:
    """A call that has been warmed up, and how its samples are taken."""

    def __init__(self, clock: Clock, call: Call) -> None:
        self.clock, self.call = clock, call
        self.turn = count()
        self.once()
        self.once()
        clock.synchronize()
        start = time.perf_counter()
        self.once()
        self.host = time.perf_counter() - start  # until everything is queued, at least
        clock.synchronize()
        self.slow = time.perf_counter() - start > SLOW
        self.tries = 4
        self.graph: torch.cuda.CUDAGraph | None = None
        self.method, self.copies = "wall", 1
        if not clock.cuda:
            return
        self.method = "cold" if call.cold else "queued"
        if call.cold:
            self._queued(1)
        if call.cold or self.slow:
            return
        estimate = max(self._queued(3), 1e-7)
        self.copies = max(1, min(512, int(SAMPLE_SECONDS / estimate)))
        if estimate * len(call.functions) < 20 * SAMPLE_SECONDS:  # all sets in every sample
            self.copies = -(-self.copies // len(call.functions)) * len(call.functions)
        if call.graph and self.copies > 1:
            self._capture()

    def once(self) -> None:
        self.call.functions[next(self.turn) % len(self.call.functions)]()

    def sample(self) -> float:
        """Seconds of one call. The backend is in use already."""
        if self.method == "wall":
            return self.clock.wall(self.once)
        if self.graph is not None:
            self.clock.wait(3e-4)  # a large graph takes the host a while to launch
            self.clock.start.record()
            self.graph.replay()
            return self.clock.stop() / self.copies
        return self._queued(self.copies)

    def sample_wall(self) -> float:
        """Seconds of one call in a row of calls, from the first on the host to the last on the device."""
        calls = max(1, min(20, int(5e-3 / max(self.host, 1e-6))))
        self.clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self.once()
        self.clock.synchronize()
        return (time.perf_counter() - start) / calls

    def _queued(self, copies: int) -> float:
        """Where the device came to the first call before the host had queued the last, it is given more to wait."""
        while True:
            self.clock.wait(min(0.1, 1.5 * copies * self.host + 1e-4))
            if self.call.cold:
                self.clock.flush()
            self.clock.start.record()
            for _ in range(copies):
                self.once()
            self.clock.end.record()
            in_time = not self.clock.start.query()
            seconds = self.clock.stop(recorded=True) / copies
            if in_time or not self.tries:
                return seconds
            self.tries -= 1
            self.host *= 2

    def _capture(self) -> None:
        try:
            self.graph = self.clock.capture(lambda: [self.once() for _ in range(self.copies)])
            self.method = "graph"
        except Exception as error:
            self.call.extra = f"{self.call.extra} not captured: {first_line(error)}".strip()
            self.clock.check()


def copy_rate(clock: Clock) -> float:
    """Bytes a second, read and written, of a copy on the device that fits no cache."""
    size = 1 << 16
    if clock.cuda:
        size = min(1 << 31, torch.cuda.mem_get_info(clock.device)[0] // 8)
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    sampler = Sampler(clock, Call([lambda: target.copy_(source)], graph=False))
    samples = [sampler.sample() for _ in range(3 if clock.small else 15)]
    return 2 * source.nbytes / percentiles(samples)[1]


def compare(
    clock: Clock,
    calls: Mapping[str, Call],
    seconds: float,
    on_error: Callable[[str, Exception], None],
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Times all calls in turn, in an order that rotates from round to round.

    Args:
        seconds: for all of them together, about.
        on_error: gets what a call raised; the others go on.
        on_turn: is told which call comes next, lest that is the last that this process does.
    """
    samplers: dict[str, Sampler] = {}
    samples: dict[str, list[float]] = {}
    walls: dict[str, list[float]] = {}

    def guarded(name: str, action: Callable[[], None]) -> None:
        on_turn(name)
        try:
            with gk.use_backend(calls[name].backend):
                action()
        except DeviceLost as error:
            on_error(name, error)
            raise
        except Exception as error:
            samplers.pop(name, None)
            on_error(name, error)
            clock.check()

    def prepare(name: str) -> None:
        samplers[name] = Sampler(clock, calls[name])

    def take(name: str) -> None:
        sampler = samplers[name]
        if sampler.graph is None and not sampler.slow:
            sampler.once()  # finds the backend, which is not what is timed
        samples.setdefault(name, []).append(sampler.sample())
        if calls[name].wall:
            walls.setdefault(name, []).append(sampler.sample_wall())

    for name in calls:
        guarded(name, lambda name=name: prepare(name))
    repeats = 3 if clock.small else 40
    turn = 0
    start = time.perf_counter()
    while turn < repeats and samplers:
        names = list(samplers)
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            guarded(name, lambda name=name: take(name))
        turn += 1
        spent = time.perf_counter() - start
        if (turn >= 5 and spent > seconds) or (turn >= 3 and spent > 3 * seconds):
            break
    timings = {}
    for name, sampler in samplers.items():
        p20, p50, p80 = percentiles(samples[name])
        wall = percentiles(walls[name])[1] if name in walls else None
        timings[name] = Timing(sampler.method, p20, p50, p80, wall, len(samples[name]))
    return timings
