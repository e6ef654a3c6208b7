"""Everything about speed on one GPU: ``python -m benchmarks.gpu [PART ...]``, or ``make gpu``.

The parts, in order: build (both extensions), tests (tests/gpu and tests/kernels), topk, adam, first_step, weight_grad
(the operators), cost, llama (training steps of whole models), plots, sanitizer (memory errors and races in every
kernel; last, because it takes long). Nothing is downloaded or installed: the Python that runs this needs torch, triton,
pytest and setuptools with pybind11 and ninja. Where the package is not installed, set PYTHONPATH=.:python, as ``make
gpu`` does.

A run takes at most ``--minutes``. Whatever it measures is written to the results file at once, so rerun the same
command to resume. Rows about other sources, another device or another torch are measured again. No speed is measured
unless the tests are known to be green. ``--device cpu --small`` tries the program itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.workers import DONE, LEFT, run_worker, work, worker_command
from benchmarks.harness.bench import Bench
from benchmarks.harness.checks import RED, Checks
from benchmarks.harness.environment import RESULTS, environment, now
from benchmarks.harness.results import Results
from benchmarks.harness.tables import general


@dataclass(frozen=True)
class Part:
    """The seconds without which it is not worth starting, and whether it measures speed (in a module of its name)."""

    seconds: float
    measures: bool = False


PARTS = {
    "build": Part(60),
    "tests": Part(90),
    "topk": Part(30, measures=True),
    "adam": Part(30, measures=True),
    "first_step": Part(30, measures=True),
    "weight_grad": Part(30, measures=True),
    "cost": Part(60, measures=True),
    "llama": Part(60, measures=True),
    "plots": Part(10),
    "sanitizer": Part(45),
}


class Run:
    """One call of this program.

    Attributes:
        tables: the lines to print at the end, by part.
        left: parts that are not finished.
        failed: something went wrong in a part.
    """

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str], in_process: bool) -> None:
        self.options, self.arguments, self.in_process = options, arguments, in_process
        self.until = time.time() + 60 * options.minutes
        self.began = now()
        self.device = torch.device(options.device)
        self.results = Results(options.results, environment(self.device, arguments))
        self.checks = Checks(self.results, self.device.type == "cuda", options.small, self.until)
        self.tables: dict[str, list[str]] = {}
        self.left: list[str] = []
        self.failed = False

    def parts(self, names: Sequence[str]) -> None:
        for name in names:
            left = self.until - time.time()
            if left < (0 if self.options.small else PARTS[name].seconds) or left <= 0:
                self.left.append(name)
                self.tables[name] = [f"{name}: not started, {max(left, 0):.0f} s were left"]
                continue
            print(f"\n--- {name} ({left:.0f} s left)", flush=True)
            start = time.time()
            try:
                lines = self.part(name)
            except Exception as error:
                self.failed = True
                lines = [f"{name}: {type(error).__name__}: {error}"]
            self.tables[name] = [line for line in lines if line]
            print("\n".join([*self.tables[name], f"--- {name} took {time.time() - start:.0f} s"]), flush=True)

    def part(self, name: str) -> list[str]:
        """Runs a part and returns its table."""
        if PARTS[name].measures:
            return self.measured(name)
        if name == "plots":
            plots = importlib.import_module("benchmarks.gpu.pictures")
            return [f"plot: {path}" for path in plots.draw(self.results.path, self.results.rows())] or [
                "plots: no data"
            ]
        again = self.options.again
        lines = self.checks.build() if name == "build" else getattr(self.checks, name)(again)
        self.failed = self.failed or any(RED in line for line in lines)
        return lines

    def measured(self, name: str) -> list[str]:
        """Runs a part that measures speed, unless the tests are red or have not run."""
        verdict = self.checks.verdict()
        needed = self.device.type == "cuda" or verdict == "red"
        if verdict != "green" and needed and not self.options.anyway:
            self.failed = True
            return [f"{name}: refused, the tests are {verdict}; run the part tests, or add --anyway"]
        code = self.worker(name)
        if code == LEFT:
            self.left.append(name)
        self.failed = self.failed or code not in (DONE, LEFT)
        doubt = f", although the tests are {verdict}" if verdict != "green" else ""
        note = {DONE: "", LEFT: " (not finished)"}.get(code, " (ended by an error, see above)")
        return [f"{name}{note}, {self.results.environment['device']}{doubt}", *self.table(name)]

    def table(self, name: str) -> list[str]:
        """What the results say about a part, in a few lines."""
        rows = self.results.rows(name)
        try:
            return getattr(importlib.import_module(f"benchmarks.gpu.{name}"), "table", general)(rows)
        except Exception as error:  # a table must not cost what was measured
            return [f"  no table of its own: {type(error).__name__}: {error}", *general(rows)]

    def worker(self, name: str) -> int:
        since = self.began if self.options.again else ""
        if self.in_process:
            results = Results(self.results.path, self.results.environment, since)
            return work(Bench(name, results, self.device, self.options.small, self.until))
        own = ["--since", since] if since else []
        own += ["--command", shlex.join(self.arguments)]
        command = worker_command(name, self.until, [*self.shared(), *own])
        return run_worker(name, command, self.results, self.until, lambda text: print(f"  {text}", flush=True))

    def shared(self) -> list[str]:
        """The options that workers and continuing runs have in common with this one."""
        options = self.options
        given = [] if options.results == RESULTS / "gpu.csv" else ["--results", str(options.results)]
        given += [] if options.device == "cuda" else ["--device", options.device]
        return given + ["--small"] * options.small

    def continuing(self) -> str:
        more = ["--anyway"] * self.options.anyway
        minutes = ["--minutes", f"{self.options.minutes:g}"]
        path = os.environ.get("PYTHONPATH")  # needed again where the package is not installed
        prefix = f"PYTHONPATH={shlex.quote(path)} " if path else ""
        command = [sys.executable, "-m", "benchmarks.gpu", *minutes, *self.shared(), *more, *self.left]
        return prefix + shlex.join(command)

    def write_tables(self) -> Path:
        """All tables that the results have rows for, including those of earlier runs, in a text file next to them."""
        path = self.results.path.with_suffix(".txt")
        texts = [
            "\n".join([f"{name}, {self.results.environment['device']}", *self.table(name), ""])
            for name, part in PARTS.items()
            if part.measures and self.results.rows(name)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts))
        return path

    def report(self) -> None:
        print("\n=== " + ", ".join(f"{n} {self.results.environment[n]}" for n in ("device", "driver", "cuda", "torch",
              "triton", "source") if self.results.environment[n]))  # fmt: skip
        if len(self.tables) > 1:  # the table of a single part is right above
            for lines in self.tables.values():
                print("\n".join(lines))
        print(f"results: {self.results.path}, {self.write_tables()}")
        if self.left:
            print(f"left: {', '.join(self.left)}; go on with:\n{self.continuing()}", flush=True)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="the results file (default: benchmarks/results/gpu.csv)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results file")
    parser.add_argument("--anyway", action="store_true", help="measure although the tests are red or have not run")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--since", default="", help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.results is None:
        if options.device == "cpu" or options.small:
            parser.error("a dry run needs --results PATH, so that it does not write among measured results")
        options.results = RESULTS / "gpu.csv"
    options.results = options.results.absolute()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA device, so there is nothing to measure. Run this on a machine with an NVIDIA GPU and "
            "a CUDA build of torch; to try the program without one, add --device cpu --small --results PATH"
        )
    return options


def main(arguments: Sequence[str] | None = None, in_process: bool = False) -> int:
    """The exit status: 0 if everything that was asked for is finished and nothing failed.

    Args:
        in_process: measure in this process instead of one for each part, for tests.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    if options.worker:
        device = torch.device(options.device)
        results = Results(options.results, environment(device, shlex.split(options.command)), options.since)
        code = work(Bench(options.worker, results, device, options.small, options.until))
        sys.stdout.flush()
        os._exit(code)  # everything is written, and tearing down a device that is lost may fail or hang
    run = Run(options, arguments, in_process)
    run.parts([name for name in PARTS if name in (options.parts or PARTS)])
    run.report()
    return int(run.failed or bool(run.left))


if __name__ == "__main__":
    sys.exit(main())
