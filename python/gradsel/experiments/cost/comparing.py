"""How steps of whole models are compared.

Every entry of a comparison is measured twice: alone on the device for its peak memory, then with all others resident,
one turn each in every round. The order of a round is drawn anew, so that whatever changes over time (clock rates, other
users) meets all of them alike. A turn is several calls without a synchronisation in between, because training has none
either: the time of launching kernels counts only where the device waits for it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gradsel.experiments.cost.contenders import Entry, Row, Running
from gradsel.experiments.cost.timing import (
    ERROR,
    check_device,
    first_line,
    on_the_device,
    peak_recorded,
    percentiles,
    release,
    rounded,
    shuffled,
    time_calls,
)

WARM_UP = 2
FEWEST, MOST = 3, 15  # rounds
_MEASURED = "the call whose memory counts"


# --- Measuring ---------------------------------------------------------------------------------------------------


def peak_bytes(start: Callable[[], Running], cuda: bool) -> int | None:
    """The most that tensors of an entry hold during a call, weights included, after some calls to warm up.

    Returns:
        None on a CPU whose allocations torch's profiler does not tell.
    """
    release()
    if not cuda:
        return _peak_on_cpu(start)
    before = torch.cuda.memory_allocated()
    running = start()
    for _ in range(WARM_UP):
        running.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    running.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(start: Callable[[], Running]) -> int | None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        running = start()
        running.run()  # the optimizer makes its moments
        with torch.profiler.record_function(_MEASURED):
            running.run()
    recorded: Any = getattr(profiler.profiler, "kineto_results", None)
    return None if recorded is None else peak_recorded(recorded, since=_MEASURED)


def kernels(run: Callable[[], object]) -> dict[str, Any]:
    """How long kernels ran in one call, and how many ran. The rest of the time are gaps in which the host was late."""
    try:
        ran = [event.time_range.elapsed_us() for event in on_the_device(run)]
        return {"kernels_ms": rounded(sum(ran) / 1000), "kernels": len(ran)} if ran else {}
    except Exception as error:  # an extra that must not cost the rest
        return {"kernels": first_line(error)}


class _Work:
    """Entries and what has been measured of them."""

    def __init__(self, context: Any, how: Comparison, entries: Sequence[Entry]) -> None:
        self.context, self.how, self.entries = context, how, entries
        self.cuda = torch.device(context.device).type == "cuda"
        self.peaks: dict[Entry, int] = {}
        self.running: dict[Entry, Running] = {}
        self.facts: dict[Entry, dict[str, Any]] = {}
        self.samples: dict[Entry, list[tuple[float, float]]] = {entry: [] for entry in entries}
        self.failed: set[Entry] = set()
        self.rows: list[Row] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.context.deadline - time.monotonic()

    def emit(self, entry: Entry, row: Row, extra: str) -> None:
        row = self.how.shared | entry.key | row | {"extra": extra}
        if entry in self.peaks:
            row["peak_bytes"] = self.peaks[entry]
        self.context.emit(row)
        self.rows.append(row)

    def guarded(self, entry: Entry, action: Callable[[Entry], None]) -> None:
        """Does something for an entry; an error becomes its row."""
        if entry in self.failed:
            return
        try:
            action(entry)
        except Exception as error:
            self.failed.add(entry)
            self.running.pop(entry, None)
            self.emit(entry, {}, ERROR + first_line(error))
            if self.cuda:
                check_device()
        if entry in self.failed:
            release()  # only now is the traceback gone that kept the entry's tensors alive

    def measure_peak(self, entry: Entry) -> None:
        found = peak_bytes(entry.start, self.cuda)
        if found is not None:
            self.peaks[entry] = found

    def start(self, entry: Entry) -> None:
        if self.left < 0:
            return
        running = entry.start()
        for _ in range(WARM_UP):
            running.run()
        self.running[entry], self.facts[entry] = running, running.facts

    def sample(self, entry: Entry) -> None:
        seconds = time_calls(self.running[entry].run, self.how.calls, self.cuda)
        self.samples[entry].append((1e3 * seconds[0], 1e3 * seconds[1]))

    def measure(self) -> None:
        with contextlib.suppress(Exception):
            # What entries share, and what libraries such as cuBLAS allocate once and keep, belongs to no method.
            self.entries[0].start().run()
        for entry in self.entries:
            if self.left > 2 * self.how.seconds:  # times matter more
                self.guarded(entry, self.measure_peak)
        release()
        for entry in self.entries:
            self.guarded(entry, self.start)
        orders, began, rounds = shuffled(self.running), time.monotonic(), 0
        while rounds < MOST and self.left > 0 and (rounds < FEWEST or time.monotonic() - began < self.how.seconds):
            for entry in next(orders):
                self.guarded(entry, self.sample)
            rounds += 1

    def report(self) -> None:
        baseline, ratios, tokens = self.how.baseline, self.how.ratios, self.how.tokens
        times = {entry: found for entry, found in self.samples.items() if entry not in self.failed and len(found) > 1}
        medians = {entry.name: statistics.median(ms for ms, _ in found) for entry, found in times.items()}
        for entry in self.entries:
            if entry in self.failed:
                continue
            if entry not in times:
                self.emit(entry, {}, f"{ERROR}out of time")
                continue
            p20, p50, p80 = percentiles([ms for ms, _ in times[entry]])
            row = {
                "repeats": len(times[entry]), "p20_ms": rounded(p20), "p50_ms": rounded(p50), "p80_ms": rounded(p80),
                "wall_p50_ms": rounded(statistics.median(wall for _, wall in times[entry])),
            }  # fmt: skip
            if baseline in medians:
                row |= {"baseline": baseline, "speedup": rounded(medians[baseline] / p50)}
            said = self.facts[entry] | {
                name: f"{p50 / medians[other]:.3f}" for name, other in ratios.items() if other in medians
            }
            if entry not in self.peaks:
                said["peak"] = "out of time"
            if tokens:
                said["tokens_per_s"] = f"{1000 * tokens / p50:.0f}"
            self.emit(entry, row, told(said))

    def profile(self) -> None:
        """Emits the rows again with what the profiler says. This comes last, because it is an extra that may fail."""
        for row in self.rows if self.cuda else ():
            entry = next((entry for entry in self.running if entry.key.items() <= row.items()), None)
            if entry is not None and "p50_ms" in row and self.left > self.how.seconds:
                row["extra"] = "; ".join(filter(None, (row["extra"], told(kernels(self.running[entry].run)))))
                self.context.emit(row)


def told(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}={value}" for name, value in facts.items() if value != "")


@dataclass(frozen=True)
class Comparison:
    """Entries that are measured in turn.

    Attributes:
        shared: what their rows have in common.
        calls: calls in a turn.
        seconds: for all rounds together, about.
        baseline: the entry that ``speedup`` refers to.
        ratios: for each name in ``extra``, the entry whose time the ratio is to.
        tokens: tokens of a call, for ``tokens_per_s``.
    """

    shared: Row
    entries: Sequence[Entry]
    calls: int
    seconds: float
    baseline: str
    ratios: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0

    def missing(self, context: Any) -> list[Entry]:
        """The entries that are not in the results yet."""
        return [entry for entry in self.entries if not context.done(self.shared | entry.key)]

    def measure(self, context: Any) -> list[Row]:
        """Measures what is missing together with what it is compared with, and emits a row for each."""
        missing = self.missing(context)
        if not missing or context.deadline < time.monotonic():
            return []
        references = {self.baseline, *self.ratios.values()}
        wanted = [entry for entry in self.entries if entry in missing or entry.name in references]
        work = _Work(context, self, wanted)
        try:
            work.measure()
            work.report()
            work.profile()
        finally:
            work.running.clear()
            release()
        return work.rows


# --- Running a part by itself ------------------------------------------------------------------------------------


@dataclass
class Alone:
    """What a part needs to run without the others."""

    device: str
    small: bool
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def done(self, key: Row) -> bool:
        return False

    def emit(self, row: Row) -> None:
        self.rows.append(row)
        peak = f"{row['peak_bytes'] / 1e9:7.2f} GB" if "peak_bytes" in row else ""
        times = f"{row['p50_ms']:>8} ms {row['wall_p50_ms']:>8} ms" if "p50_ms" in row else ""
        name = f"{row['operation']}, {row['size']}, {row['dtype']}: {row['method']} {row['k'] or ''}"
        print(f"{name:<80}{times} {peak} {row['extra']}", flush=True)
