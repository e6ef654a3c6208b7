"""Memory that torch allocates, as its profiler counts it."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from gradsel.experiments.cost.timing import peak_recorded


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak bytes of tensors that ``run`` keeps alive, not counting those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    peak = peak_recorded(profiler.profiler.kineto_results)
    assert peak is not None
    return peak
