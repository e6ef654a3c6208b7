"""Runs each part in a process of its own: starts it, watches it, and restarts it after an error on the device."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.bench import Bench, OutOfTime, marker
from benchmarks.harness.environment import ROOT
from benchmarks.harness.results import CASE, Results
from gradsel.experiments.cost.timing import ERROR, DeviceLost, first_line, rounded

#: How a worker ends: everything is measured, an error in the part itself, out of time, or the device is lost. The last
#: one means that it does not end.
DONE, BROKEN, LEFT, LOST, HANGS = 0, 1, 3, 75, 1000
RESTARTS = 8
#: Seconds that a worker may run past its deadline, because it finishes a case that it has begun; and seconds that one
#: call may take, compilation included, before the worker counts as hung.
GRACE, HUNG = 15.0, 90.0


class Lines:
    """What the parts about whole models get instead of a bench: they make their own rows.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        small: toy sizes.
        deadline: when to stop, by ``time.monotonic()``.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.device, self.small = bench.device.type, bench.small
        self.deadline = time.monotonic() + bench.left()
        self.all_measured = True

    def done(self, row: Mapping[str, Any]) -> bool:
        """The row is in the results already, judging by its case, ``provider`` and ``method``."""
        found = self._bench.found(*(row.get(name, "") for name in CASE[1:]))
        return self._provider(row) in found

    def emit(self, row: Mapping[str, Any]) -> None:
        """Writes a row. ``method`` is the method of training here, and becomes part of the provider's name."""
        extra = str(row.get("extra", ""))
        if extra == f"{ERROR}out of time":  # so that a later run measures it
            self.all_measured = False
            return
        cells = {name: rounded(value) if isinstance(value, float) else value for name, value in row.items()}
        own = {"part": self._bench.part, "provider": self._provider(row), "method": "events", "extra": extra}
        self._bench.results.add([{**cells, **own}])
        times = f"{cells['p50_ms']} ms" if "p50_ms" in cells else ""
        name = " ".join(str(row.get(name, "")) for name in CASE[1:])
        print(f"  {name} {own['provider']}: {times} {extra[:90]}", flush=True)

    @staticmethod
    def _provider(row: Mapping[str, Any]) -> str:
        parts = [str(row.get(name, "")) for name in ("method", "provider")]
        return f"{parts[0]} ({parts[1]})" if all(parts) else "".join(parts)


def work(bench: Bench) -> int:
    """Measures a part in this process, and returns how it ended."""
    gc.collect()
    gc.freeze()  # what is imported stays, so it need not be searched before every capture of a graph
    try:
        bench.need(5.0)
        bench.clock.warm_up()
        print(f"  a copy on the device: {bench.copy_rate / 1e9:.4g} GB/s, read and written", flush=True)
        bench.release()
        module = importlib.import_module(f"benchmarks.gpu.{bench.part}")
        if hasattr(module, "measure"):
            module.measure(bench)
        else:
            lines = Lines(bench)
            module.run(lines)
            if not lines.all_measured or time.monotonic() > lines.deadline:
                return LEFT
    except OutOfTime:
        return LEFT
    except DeviceLost as error:
        print(f"  the device is lost to this process: {error}", flush=True)
        return LOST
    except Exception as error:
        traceback.print_exc()
        _blame(bench.results, bench.part, first_line(error))
        with contextlib.suppress(Exception):
            bench.clock.check()
            return BROKEN
        return LOST
    if bench.skipped:
        print(f"  {bench.skipped} cases were in the results already", flush=True)
    return DONE


def run_worker(part: str, command: Sequence[str], results: Results, until: float, say: Callable[[str], None]) -> int:
    """Runs a part in processes of its own until it is finished, out of time, or broken.

    Args:
        command: starts the worker.
        until: its deadline, by ``time.time()``.
    """
    for _ in range(RESTARTS):
        marker(results.path).unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = _watched(process, marker(results.path), until + GRACE)
        finally:  # nothing is left running, even after an interrupt
            if process.poll() is None:
                process.kill()
                process.wait()
        known = marker(results.path).exists()
        if code in (DONE, LEFT):
            marker(results.path).unlink(missing_ok=True)
            return code
        if code == BROKEN and not known:
            return code
        if code != LOST:
            _blame(results, part, f"the process ended by {_ending(code)}")
            if not known:  # nothing says what to leave out the next time
                return BROKEN
        if time.time() > until:
            return LEFT
        say(f"{part}: ended by {_ending(code)}; the case is in the results, and a new process goes on")
    return BROKEN


def _watched(process: subprocess.Popen, running: Path, until: float) -> int:
    """The exit status of a worker; HANGS: it has begun nothing new for too long; LEFT: it is past its deadline."""
    while True:
        try:
            return process.wait(1.0)
        except subprocess.TimeoutExpired:
            now = time.time()
            with contextlib.suppress(FileNotFoundError):
                if now - running.stat().st_mtime > HUNG:
                    return HANGS
            if now > until:
                return LEFT


def _ending(code: int) -> str:
    if code == HANGS:
        return "taking too long"
    if code == LOST:
        return "an error on the device"
    try:
        return signal.Signals(-code).name if code < 0 else f"status {code}"
    except ValueError:
        return f"status {code}"


def _blame(results: Results, part: str, why: str) -> None:
    """Writes an error row for what ran last, or for the part as a whole."""
    path: Path = marker(results.path)
    if path.exists():
        running = json.loads(path.read_text())
        path.unlink()
    else:
        running = {**dict.fromkeys(CASE, ""), "part": part, "operation": "the part itself", "providers": [""]}
    case = {name: running[name] for name in CASE}
    results.add([{**case, "provider": name, "extra": f"{ERROR}{why}"} for name in running["providers"]])


def worker_command(part: str, until: float, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--worker", part, "--until", str(until), *options]
