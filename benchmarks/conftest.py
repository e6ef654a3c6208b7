"""Runs the CPU benchmarks: ``pytest benchmarks`` measures, prints tables and writes ``benchmarks/results/cpu.csv``.

A test compares all providers of one kernel, size and dtype, for every K together. What does not depend on K, such as a
baseline, is measured once, in the same rounds as every K; its row has k = 0. The order within a round is drawn anew
each time (see harness/timing.py). So a baseline is one figure for each shape, and what its neighbours leave in the
caches cannot favour any K.

There is a row for each kernel, size, dtype, k and provider. Rows of an earlier run with the same key are replaced, so
that a part can be run again. ``--results`` names another file, ``--seconds`` a shorter time: ``pytest benchmarks
--seconds 0 --results /tmp/cpu.csv`` tries the programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.clock import Clock
from benchmarks.harness.environment import RESULTS, machine
from benchmarks.harness.results import CPU_FIELDS, CPU_KEY, load, merge
from benchmarks.harness.tables import over_baselines
from benchmarks.harness.timing import Call, Rounds, compare, copy_rate

#: Name to (function, bytes that it has to move at least).
Providers = Mapping[str, tuple[Callable[[], object], int]]
Rows = list[dict[str, Any]]

_measured = pytest.StashKey[Rows]()


def pytest_addoption(parser):
    parser.addoption("--results", default=str(RESULTS / "cpu.csv"), help="the CSV file (default: %(default)s)")
    parser.addoption("--seconds", default=4.0, type=float, help="approximate seconds for each K (default: %(default)s)")


def pytest_configure(config):
    config.stash[_measured] = []


def pytest_sessionfinish(session):
    rows = session.config.stash[_measured]
    if rows:
        merge(Path(session.config.getoption("--results")), CPU_FIELDS, CPU_KEY, rows)


def pytest_terminal_summary(terminalreporter, config):
    """The table of what this run has measured."""
    new = {tuple(str(row[name]) for name in CPU_KEY) for row in config.stash[_measured]}
    if new:
        path = Path(config.getoption("--results"))
        shown = [row for row in load(path) if tuple(row[name] for name in CPU_KEY) in new]
        terminalreporter.write_line(over_baselines(shown))
        terminalreporter.write_line(f"\n{os.path.relpath(path)}")


@pytest.fixture(scope="session")
def clock() -> Clock:
    return Clock(torch.device("cpu"))


@pytest.fixture(scope="session")
def bandwidth(clock) -> float:
    """Bytes a second, read and written, of a large copy."""
    return copy_rate(clock)


@pytest.fixture
def contest(request, clock, bandwidth, benchmark):
    """Times the providers of one kernel, size and dtype against each other.

    Afterwards pytest-benchmark times the last one, ours at the largest K, by itself: its options save runs and compare
    them (``--benchmark-autosave``, ``--benchmark-compare``).
    """
    config = request.config

    def run(kernel: str, size: str, dtype: str, contenders: Mapping[int, Providers]) -> None:
        """
        Args:
            contenders: providers by K; those under 0 do not depend on K.
        """
        calls = {
            (k, name): Call([function], moved, cold=True)
            for k, providers in contenders.items()
            for name, (function, moved) in providers.items()
        }
        seconds = config.getoption("--seconds") * len(contenders)
        rounds = Rounds(seconds, fewest=7, enough=7, most=200) if seconds else Rounds(0, most=3)
        for (k, name), timing in compare(clock, calls, rounds).items():
            moved = calls[k, name].moved
            config.stash[_measured].append(
                {
                    "kernel": kernel,
                    "size": size,
                    "dtype": dtype,
                    "k": k,
                    "provider": name,
                    "p20_us": f"{1e6 * timing.p20:.1f}",
                    "p50_us": f"{1e6 * timing.p50:.1f}",
                    "p80_us": f"{1e6 * timing.p80:.1f}",
                    "rounds": timing.repeats,
                    "bytes": moved,
                    "gb_per_s": f"{moved / timing.p50 / 1e9:.1f}",
                    "fraction_of_copy": f"{moved / timing.p50 / bandwidth:.2f}",
                    **machine(),
                }
            )

        _, providers = list(contenders.items())[-1]
        name, (function, moved) = list(providers.items())[-1]
        benchmark.group = f"{kernel}, {size}, {dtype}"
        benchmark.extra_info.update(provider=name, bytes=moved)
        benchmark.pedantic(function, rounds=5 if seconds else 1, warmup_rounds=1)

    return run
