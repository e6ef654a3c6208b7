"""What a part of the GPU benchmarks measures with: known cases are skipped, and an error stays in its case.

A part's ``measure(bench)`` calls :meth:`Bench.compare` for each case, the important ones first. It runs in a process of
its own, because some errors on a GPU end the process. What is about to run is noted in a file beforehand, so that the
process that is started next (see gpu/workers.py) knows what to leave out.

Each case includes the baseline that its ``speedup`` refers to, measured in the same rounds from a flushed cache. A
baseline that does not depend on K is thus measured again with every K; compare times within a case, or its speedups.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.clock import Clock
from benchmarks.harness.results import CASE, OFF, REFUSED, Results, Row, failed
from benchmarks.harness.timing import Call, Rounds, Timing, compare, copy_rate
from gradsel.experiments.cost.timing import ERROR, DeviceLost, first_line, rounded
from gradsel_kernels import backends

#: Makes a call: allocates what it needs and checks what it likes. It may raise an error.
Provider = Callable[[], Call]


class OutOfTime(Exception):
    """The remaining time is too short for what is left to do."""


class Bench:
    """Measures the cases of one part.

    Args:
        part: its name.
        results: where rows go.
        device: what to measure on.
        small: toy sizes, to try the program.
        until: when to stop, by ``time.time()``.
    """

    def __init__(self, part: str, results: Results, device: torch.device, small: bool, until: float) -> None:
        self.part, self.results, self.device, self.small, self.until = part, results, device, small, until
        self.clock = Clock(device, small)
        #: The backends that are compared. One that is off is reported as such.
        self.backends: tuple[str, ...] = ("triton", "cuda")
        if device.type == "cpu":
            self.backends = ("reference",) if off("native", device) else ("native",)
        self.skipped = 0
        self._off = {name: off(name, device) for name in self.backends}

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second of a large copy, which other rates are given as a fraction of."""
        return copy_rate(self.clock)

    # --- What is done, what is left ---------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.until - time.time()

    def need(self, seconds: float) -> None:
        """
        Raises:
            OutOfTime: less is left.
        """
        if self.left() < seconds:
            raise OutOfTime

    def backend(self, name: str) -> str:
        """The name of a backend that works.

        Raises:
            BackendOff: it does not.
        """
        reason = self._off.get(name) if name in self._off else off(name, self.device)
        if reason:
            raise BackendOff(reason)
        return name

    def found(self, operation: str, size: str, dtype: str, k: Any) -> dict[str, Row]:
        """The rows of a case by provider."""
        wanted = dict(zip(CASE, (self.part, operation, size, dtype, str(k)), strict=True))
        rows = self.results.rows(self.part)
        return {row["provider"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}

    def is_done(self, operation: str, size: str, dtype: str, k: Any, providers: Iterable[str]) -> bool:
        """Nothing of a case is left to measure. Errors count as measured, except of a backend that is on by now."""
        found = self.found(operation, size, dtype, k)
        return all(name in found and not self._is_back(found[name]) for name in providers)

    def _is_back(self, row: Row) -> bool:
        return row["extra"].startswith(OFF) and any(
            name in row["provider"] and not reason for name, reason in self._off.items()
        )

    # --- Measuring ----------------------------------------------------------------------------------------------

    def compare(
        self,
        operation: str,
        size: str,
        dtype: str,
        k: Any,
        providers: Mapping[str, Provider],
        baseline: str | None = None,
        seconds: float = 0.4,
        expected: float = 2.0,
    ) -> None:
        """Times the providers of one case in turn, and writes a row for each.

        Args:
            baseline: the provider that ``speedup`` is against.
            seconds: for the timing of all of them, about.
            expected: seconds for everything; with less left, the part stops here.

        Raises:
            OutOfTime: the part ends.
            DeviceLost: the process has to.
        """
        case = dict(zip(CASE, (self.part, operation, size, dtype, str(k)), strict=True))
        if self.is_done(operation, size, dtype, k, providers):
            self.skipped += 1
            return
        self.need(expected)
        before = self.found(operation, size, dtype, k)
        # A provider that has failed in this case may have ended the process then, so it is not tried again.
        left = [
            name for name in providers if name not in before or not failed(before[name]) or self._is_back(before[name])
        ]
        calls: dict[str, Call] = {}
        errors: list[Row] = []

        def on_error(name: str, error: BaseException) -> None:
            text = f"{ERROR}{first_line(error)}"
            if isinstance(error, (BackendOff, Refused)):
                text = f"{OFF if isinstance(error, BackendOff) else REFUSED}{error}"
            errors.append({**case, "provider": name, "extra": text[:240]})
            self.results.add(errors[-1:])

        def on_turn(*names: str) -> None:
            marker(self.results.path).write_text(json.dumps({**case, "providers": names}))

        timings: dict[str, Timing] = {}
        peaks: dict[str, int | None] = {}
        try:
            for name in left:
                on_turn(name)
                try:
                    calls[name] = providers[name]()
                    self.clock.synchronize()  # an error in what it has started appears here, not in the next provider
                except Exception as error:
                    on_error(name, error)
                    self.clock.check()
            rounds = Rounds(0.02, most=3) if self.small else Rounds(seconds)
            timings = compare(self.clock, calls, rounds, on_error, on_turn)
            for name in timings:
                on_turn(name)
                with backends.use_backend(calls[name].backend):
                    peaks[name] = self.clock.peak(calls[name].functions[0])
            on_turn(*left)
            self.results.add([
                {**case, "provider": name, **self.columns(timing, calls[name].moved), "extra": calls[name].extra,
                 "peak_bytes": "" if peaks[name] is None else peaks[name], **self._against(timings, baseline, name)}
                for name, timing in timings.items()
            ])  # fmt: skip
        except DeviceLost:
            if not errors:  # no provider was running, so all of them are to blame
                self.results.add([{**case, "provider": name, "extra": f"{ERROR}the device was lost"} for name in left])
            raise
        marker(self.results.path).unlink(missing_ok=True)
        calls.clear()
        self._say(case, timings, errors)

    def note(self, operation: str, size: str, dtype: str, k: Any, provider: str, extra: str) -> None:
        """Writes a row that has words but no times."""
        case = dict(zip(CASE, (self.part, operation, size, dtype, str(k)), strict=True))
        self.results.add([{**case, "provider": provider, "extra": extra}])

    def columns(self, timing: Timing, moved: int = 0) -> dict[str, str]:
        """The columns of a timing."""
        columns = {
            "method": timing.method,
            **{f"{name}_ms": rounded(1e3 * getattr(timing, name)) for name in ("p20", "p50", "p80")},
            "wall_p50_ms": rounded(None if timing.wall is None else 1e3 * timing.wall),
            "repeats": str(timing.repeats),
        }
        if moved:
            rate = moved / timing.p50
            columns |= {
                "bytes": str(moved),
                "gb_per_s": rounded(rate / 1e9),
                "fraction_of_copy": rounded(rate / self.copy_rate),
            }
        return columns

    @staticmethod
    def _against(timings: Mapping[str, Timing], baseline: str | None, name: str) -> dict[str, str]:
        if baseline is None or baseline not in timings:
            return {}
        return {"baseline": baseline, "speedup": rounded(timings[baseline].p50 / timings[name].p50)}

    @staticmethod
    def _say(case: Row, timings: Mapping[str, Timing], errors: Sequence[Row]) -> None:
        """Prints one line for each case, to show progress."""
        cells = [f"{name} {1e3 * timing.p50:.4g}" for name, timing in timings.items()]
        cells += [f"{row['provider']}: {row['extra'].removeprefix(ERROR)[:40]}" for row in errors]
        name = " ".join(value for value in case.values() if value)
        print(f"  {name}, ms: {', '.join(cells)}", flush=True)

    def release(self) -> None:
        """Gives memory back between sizes."""
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()


class BackendOff(RuntimeError):
    """Why a backend cannot run."""


class Refused(RuntimeError):
    """What a provider does not do on purpose: a result rather than an error."""


def off(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if name not in backends.NAMES:
        return f"there is no backend {name!r}"
    try:
        return backends.backend(name).why_off(device)
    except Exception as error:  # whatever its import runs into
        return first_line(error)


def marker(results: Path) -> Path:
    """The file that says what is running."""
    return results.with_name(results.name + ".running")
