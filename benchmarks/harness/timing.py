"""How calls are timed: interleaved, in an order that is drawn anew in every round.

Every comparison here takes one sample of each call in every round. The order of a round is random (and the same in
every run), so no call always follows the same other one: neither a drifting clock rate nor what a neighbour leaves in
the caches can favour any of them.

On a GPU, a call of a few microseconds takes longer to launch than to run. Device time is therefore taken where the
host is ahead of the device, by one of these methods:

- ``graph``: a CUDA graph of many copies of the call, replayed between two events;
- ``queued``: the calls are queued behind a kernel that only waits, so that the device finds all of them ready; for what
  cannot be captured and for what takes long;
- ``cold``: one call at a time, queued in the same way, after the second-level cache has been flushed; for optimizer
  steps, between which a training loop runs forward and backward. The two events add one or two microseconds;
- ``wall``: the wall clock, on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

import gradsel_kernels as gk
from benchmarks.harness.clock import Clock
from gradsel.experiments.cost.timing import DeviceLost, Function, first_line, percentiles, shuffled

#: Device time of one sample, long against the resolution of events. Calls shorter than this are captured in a graph.
SAMPLE_SECONDS = 1e-3
#: A call that takes more seconds than this is made once a sample, and not repeated beforehand.
SLOW = 0.02


def interleaved(
    makers: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of calls on the wall clock, one sample of each in every round, for what runs on the CPU.

    Args:
        makers: each returns the call that is timed next, after what needs no timing.
        warm_up: rounds that are not counted, before the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number, order in zip(range(warm_up + rounds), shuffled(makers), strict=False):
        for name in order:
            call = makers[name]()
            start = time.perf_counter()
            call()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- A comparison of calls ---------------------------------------------------------------------------------------


@dataclass
class Call:
    """One way of doing the work that is compared.

    Attributes:
        functions: the same call on different inputs, made in turn.
        moved: bytes that it has to read and write.
        backend: of gradsel_kernels; None: the one in use anyway.
        graph: it may be captured.
        cold: it should not find in the cache what its own previous call has left there.
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


@dataclass(frozen=True)
class Rounds:
    """How many rounds a comparison takes.

    Attributes:
        seconds: for all calls together, about.
        fewest: rounds that are taken even if they need three times as long.
        enough: rounds after which the comparison ends once ``seconds`` have passed.
        most: rounds, however short the calls are.
    """

    seconds: float
    fewest: int = 3
    enough: int = 5
    most: int = 40

    def over(self, done: int, spent: float) -> bool:
        late = done >= self.enough and spent > self.seconds
        return done >= self.most or late or (done >= self.fewest and spent > 3 * self.seconds)


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

    @property
    def primed(self) -> bool:
        """It is called once ahead of each sample, to find its backend. Not so what is cold on the CPU: the other calls
        have swept the caches, and its own must not fill them again."""
        return self.graph is None and not self.slow and (self.clock.cuda or not self.call.cold)

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
        """Seconds of one call among several that are queued. If the device has reached the first one before the host
        has queued the last, the wait is made longer."""
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
    """Bytes a second, read and written, of a copy on the device that fits no cache.

    On a CPU, what stays in a cache goes faster than that, and so does memory that is updated in place: a copy first
    fetches the lines that it is about to overwrite, which nobody counts. A fraction above 1 means one of the two.
    """
    size = 1 << 16 if clock.small else 1 << 28
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
    rounds: Rounds,
    on_error: Callable[[str, Exception], None] | None = None,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Times all calls, one sample of each in every round.

    Args:
        on_error: gets what a call raised, and the other calls go on; None: the error is raised.
        on_turn: is told which call comes next, in case it is the last one that this process makes.
    """
    samplers: dict[str, Sampler] = {}
    samples: dict[str, list[float]] = {}
    walls: dict[str, list[float]] = {}

    def guarded(name: str, action: Callable[[str], None]) -> None:
        on_turn(name)
        try:
            with gk.use_backend(calls[name].backend):
                action(name)
        except Exception as error:
            if on_error is None:
                raise
            if isinstance(error, DeviceLost):
                on_error(name, error)
                raise
            samplers.pop(name, None)
            on_error(name, error)
            clock.check()

    def prepare(name: str) -> None:
        samplers[name] = Sampler(clock, calls[name])

    def take(name: str) -> None:
        sampler = samplers[name]
        if sampler.primed:
            sampler.once()
        samples.setdefault(name, []).append(sampler.sample())
        if calls[name].wall:
            walls.setdefault(name, []).append(sampler.sample_wall())

    for name in calls:
        guarded(name, prepare)
    start = time.perf_counter()
    for done, order in enumerate(shuffled(samplers)):
        if not samplers or rounds.over(done, time.perf_counter() - start):
            break
        for name in order:
            if name in samplers:  # until it fails
                guarded(name, take)
    timings = {}
    for name, sampler in samplers.items():
        p20, p50, p80 = percentiles(samples[name])
        wall = percentiles(walls[name])[1] if name in walls else None
        timings[name] = Timing(sampler.method, p20, p50, p80, wall, len(samples[name]))
    return timings
