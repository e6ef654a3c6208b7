"""The tools for timing on a device: events, a wait, a cache flush and graphs; on the CPU, a wall clock."""

from __future__ import annotations

import time
from functools import cached_property

import torch

from gradsel.experiments.cost.timing import Function, check_device, on_the_device

#: The inputs of all copies of a call take this many times the second-level cache, so that none is found there.
CACHES = 4
MOST_SETS = 256


class Clock:
    """Takes times on one device.

    Args:
        device: a CUDA device, or the CPU to try a program.
        small: take as few and as short samples as possible.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device, self.small = device, small
        self.cuda = device.type == "cuda"
        self.cache = 1 << 14
        if small and not self.cuda:
            torch.set_num_threads(1)  # toy sizes are not worth a second one
        if self.cuda:
            self.cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 26
            self.start = torch.cuda.Event(enable_timing=True)
            self.end = torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def check(self) -> None:
        """
        Raises:
            DeviceLost: nothing else can be run in this process.
        """
        if self.cuda:
            check_device()

    def stop(self, recorded: bool = False) -> float:
        """Seconds on the device from ``start`` to ``end``, which is recorded now unless it has been already."""
        if not recorded:
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def wall(self, function: Function) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def capture(self, function: Function) -> torch.cuda.CUDAGraph:
        """A graph of what a function does on the device, replayed once. Raises the reason if it cannot be captured."""
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own stream current
        graph.replay()
        self.synchronize()
        return graph

    def wait(self, seconds: float) -> None:
        """Keeps the device busy while the host queues what is timed."""
        if self.cuda:
            torch.cuda._sleep(int(seconds * self._cycles))

    def warm_up(self, seconds: float = 0.5) -> None:
        """Waits until the device, which may have been idle, runs at its full clock rate."""
        matrix = torch.ones(2048 if self.cuda else 64, 2048 if self.cuda else 64, device=self.device)
        start = time.perf_counter()
        while time.perf_counter() - start < (0.01 if self.small else seconds):
            matrix @ matrix
            self.synchronize()

    @cached_property
    def _cycles(self) -> float:
        """Cycles a second of the waiting kernel."""
        torch.cuda._sleep(1000)
        self.start.record()
        torch.cuda._sleep(10_000_000)
        return 10_000_000 / max(self.stop(), 1e-6)

    @cached_property
    def _filler(self) -> torch.Tensor:
        return torch.zeros(max(CACHES * self.cache, 1 << 12) // 4, device=self.device)

    def flush(self) -> None:
        """Fills the second-level cache by reading something else, so that nothing is left to be written back."""
        self._filler.sum()

    def sets(self, nbytes: int) -> int:
        """How many copies of inputs of this size are needed so that none of them is found in the cache."""
        if self.small:
            return 2
        return max(1, min(MOST_SETS, -(-CACHES * self.cache // max(nbytes, 1))))

    def peak(self, function: Function) -> int | None:
        """Bytes that a call allocates at its peak, beyond what was allocated before; None on the CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def launches(function: Function) -> str:
    """What a call does on the device, by the profiler."""
    function()
    torch.cuda.synchronize()
    names = [event.name for event in on_the_device(function)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return f"{len(names) - copies} kernels, {copies} copies or fills"
