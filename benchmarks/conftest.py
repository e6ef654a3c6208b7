"""The runner: interleaves every provider of a kernel in one test and collects the results in one tidy file.

``pytest benchmarks`` prints pytest-benchmark's table for our kernels; what all providers took, baselines included, is
written to ``benchmarks/results/<device>.csv`` (``--results`` names another file), one line for each kernel, size,
dtype, k and provider. Lines of an earlier run with the same key are replaced, so that a part can be run again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import MACHINE, RESULTS, machine, merge, percentiles, timed

FIELDS = [
    "kernel", "size", "dtype", "k", "provider", "p20_us", "p50_us", "p80_us", "rounds", "bytes", "gb_per_s",
    "fraction_of_copy", *MACHINE,
]  # fmt: skip
KEY = ("kernel", "size", "dtype", "k", "provider", "device", "threads")
SECONDS_PER_TEST = 4.0


def pytest_addoption(parser):
    parser.addoption("--results", default=None, help="the CSV file to write (default: benchmarks/results/<device>.csv)")


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy between two tensors that fit no cache.

    What stays in a cache goes faster, and so does memory that is updated in place: a copy first fetches the lines it
    is about to overwrite, which nobody counts. Fractions above 1 mean one of the two.
    """
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source)) for _ in range(11))


@pytest.fixture(scope="session")
def rows(request):
    collected: list[dict] = []
    yield collected
    default = RESULTS / ("cuda.csv" if torch.cuda.is_available() else "cpu.csv")
    if collected:
        merge(Path(request.config.getoption("--results") or default), FIELDS, KEY, collected)


@pytest.fixture
def compare(benchmark, rows, copy_bandwidth):
    """Times several providers of one kernel in turn, in an order that rotates from round to round."""

    def run(kernel: str, size: str, dtype: str, k: int, providers: dict[str, tuple[Callable[[], object], int]]) -> dict:
        """
        Args:
            providers: name to (function, bytes it has to move at least). Ours comes last; pytest-benchmark times it.

        Returns:
            Median seconds by provider.
        """
        *others, ours = providers
        estimate = 0.0
        for function, _ in providers.values():
            function()
            estimate += timed(function)
        rounds = int(min(200, max(7, SECONDS_PER_TEST / estimate)))
        samples: dict[str, list[float]] = {name: [] for name in others}
        turn = 0

        def others_first():
            nonlocal turn
            for i in range(len(others)):
                name = others[(i + turn) % len(others)]
                samples[name].append(timed(providers[name][0]))
            turn += 1

        benchmark.group = f"{kernel} {size} {dtype}"
        benchmark.pedantic(providers[ours][0], setup=others_first, rounds=rounds)
        samples[ours] = list(benchmark.stats.stats.data)
        medians = {}
        for name, times in samples.items():
            p20, p50, p80 = percentiles(times)
            medians[name] = p50
            moved = providers[name][1]
            rows.append(
                {
                    "kernel": kernel,
                    "size": size,
                    "dtype": dtype,
                    "k": k,
                    "provider": name,
                    "p20_us": f"{p20 * 1e6:.1f}",
                    "p50_us": f"{p50 * 1e6:.1f}",
                    "p80_us": f"{p80 * 1e6:.1f}",
                    "rounds": rounds,
                    "bytes": moved,
                    "gb_per_s": f"{moved / p50 / 1e9:.1f}",
                    "fraction_of_copy": f"{moved / p50 / copy_bandwidth:.2f}",
                    **machine(),
                }
            )
        benchmark.extra_info.update({f"{name} / ours": medians[name] / medians[ours] for name in others})
        return medians

    return run
