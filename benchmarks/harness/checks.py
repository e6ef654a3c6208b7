"""What comes before speed: the build, the tests, and the sanitizer over every kernel. Each is a row in the results."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from benchmarks.harness.environment import ROOT, TESTED, source_hash
from benchmarks.harness.results import Results

GREEN, RED = "green: ", "red: "
PLACES = ("tests/gpu", "tests/kernels")
#: The most seconds that one folder of tests, and one tool of the sanitizer, may take.
TEST_SECONDS, SANITIZER_SECONDS = 420.0, 150.0
TOOLS = ("memcheck", "racecheck")


class Checks:
    """Runs the checks.

    Args:
        results: earlier outcomes count as long as they are about the same sources.
        on_gpu: False for a dry run, without the extension for CUDA.
        small: a few tests only.
        until: the deadline, by ``time.time()``.
    """

    def __init__(self, results: Results, on_gpu: bool, small: bool, until: float) -> None:
        self.results, self.on_gpu, self.small, self.until = results, on_gpu, small, until
        self.tested = source_hash(TESTED)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }

    # --- Build --------------------------------------------------------------------------------------------------

    def build(self) -> list[str]:
        """Builds both extensions, or without CUDA if that fails, so that Triton can still be measured."""
        required = {"GRADSEL_REQUIRE_NATIVE": "1", "GRADSEL_BUILD_JOBS": str(os.cpu_count() or 2)}
        lines = []
        for cuda in (True, False) if self.on_gpu else (False,):
            own = required | ({"GRADSEL_REQUIRE_CUDA": "1"} if cuda else {})
            code, output, seconds = self.run([sys.executable, "setup.py", "build_ext", "--inplace"], 600, own)
            if code == 0:
                failed = bool(lines)
                said = "without the one for CUDA" if failed else f"green: built in {seconds:.0f} s"
                self.record("build", "build_ext", seconds, (RED if failed else "") + said)
                return [*lines, f"build: {said}"]
            lines += [f"build{', CUDA required' if cuda else ''}: failed", *("  " + line for line in tail(output, 12))]
        self.record("build", "build_ext", seconds, RED + "failed")
        return lines

    # --- Tests --------------------------------------------------------------------------------------------------

    def tests(self, again: bool = False) -> list[str]:
        lines = []
        for place in PLACES:
            if not (ROOT / place).exists():
                lines.append(f"{place}: not there")
            elif not again and self.said("tests", place).startswith(GREEN):
                lines.append(f"{place}: {self.said('tests', place)} (earlier, same sources)")
            else:
                lines += self._test(place)
        return lines

    def _test(self, place: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=8"]
        if self.on_gpu and self.small:
            command += ["-k", "topk and not native-cpu"]
        elif self.on_gpu:
            command += ["-k", "not native-cpu"]  # those tests also run without a GPU
        elif self.small:
            command += ["-k", "bitmask"]
        parallel: list[str] = []
        cores = os.cpu_count() or 1
        if self.on_gpu and cores >= 8 and importlib.util.find_spec("xdist") is not None:
            parallel = ["-n", str(min(14, cores)), "--dist", "loadgroup"]  # most of the time is spent compiling
        for extra in [parallel, []] if parallel else [[]]:
            threads = {"OMP_NUM_THREADS": "2"} if extra else {}
            code, output, seconds = self.run([*command, *extra, place], TEST_SECONDS, threads)
            if "Different tests were collected" not in output and "INTERNALERROR" not in output:
                break
        summaries = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*?)=*$", output, re.MULTILINE)
        summary = summaries[-1].strip() if summaries else "no summary"
        passed = re.search(r"(\d+) passed", summary)
        if code is None:
            said = f"not finished after {seconds:.0f} s"
        elif code == 0 and (passed or not self.on_gpu):
            said = GREEN + summary
        elif code == 5 and not self.on_gpu:  # nothing to run
            said = GREEN + "no tests here"
        else:
            said = RED + summary
        self.record("tests", place, seconds, said)
        lines = [f"{place}: {said}"]
        if said.startswith(RED):
            failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
            lines += ["  " + line[:200] for line in (failures[:16] or tail(output, 12))]
        return lines

    def verdict(self) -> str:
        """``"green"``, ``"red"`` or ``"unknown"``: the outcome of the tests for exactly these sources."""
        said = [self.said("tests", place) for place in PLACES if (ROOT / place).exists()]
        if any(text.startswith(RED) for text in said):
            return "red"
        return "green" if said and all(text.startswith(GREEN) for text in said) else "unknown"

    # --- Sanitizer ----------------------------------------------------------------------------------------------

    def sanitizer(self, again: bool = False) -> list[str]:
        program = find_sanitizer()
        if not self.on_gpu:
            return ["sanitizer: there is no GPU"]
        if program is None:
            self.record("sanitizer", "compute-sanitizer", 0.0, "not found in PATH or /usr/local/cuda*/bin")
            return ["sanitizer: compute-sanitizer was found neither in PATH nor in /usr/local/cuda*/bin"]
        lines = []
        for tool in TOOLS:
            said = self.said("sanitizer", tool)
            if again or not said.startswith(GREEN):
                said, shown = self._sanitize(program, tool)
            else:
                said, shown = f"{said} (earlier, same sources)", []
            lines += [f"{tool}: {said}", *shown]
        return lines

    def _sanitize(self, program: str, tool: str) -> tuple[str, list[str]]:
        # API errors are not reported, because torch and Triton ask the driver for functions that it may lack.
        command = [
            program, "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no", "--print-limit", "20",
            "--launch-timeout", "0", "--target-processes", "application-only",
            sys.executable, "-m", "benchmarks.gpu.sanitized",
        ]  # fmt: skip
        # Without torch's caching allocator, every tensor is an allocation whose end the tool knows.
        code, output, seconds = self.run(command, SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        ran = "; ".join(line.removeprefix("ran ") for line in output.splitlines() if line.startswith("ran "))
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        count = re.match(r"\d+", summary[-1]) if summary else None
        if code is None:
            said = f"{RED}out of time after {seconds:.0f} s"
        elif code == 0 and count is not None and int(count[0]) == 0 and ran:
            said = f"{GREEN}{summary[-1].strip()}; {ran}"
        else:
            said = f"{RED}{summary[-1].strip() if summary else f'status {code}, no summary'}; {ran}"
        self.record("sanitizer", tool, seconds, said)
        shown = []
        if said.startswith(RED):
            reported = [line for line in output.splitlines() if line.startswith("=========")]
            shown = ["  " + line[:180] for line in (reported[:12] or tail(output, 12))]
        return said, shown

    # --- What they share ----------------------------------------------------------------------------------------

    def run(
        self, command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
    ) -> tuple[int | None, str, float]:
        """Exit status (None: it took too long), output and seconds of a command run in the root of the repository."""
        limit = max(5.0, min(seconds, self.until - time.time()))
        start = time.time()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **(environment or {})}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output, time.time() - start
        except BaseException as error:
            os.killpg(process.pid, 9)  # together with everything that it has started
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, output or "", time.time() - start

    def record(self, part: str, operation: str, seconds: float, said: str) -> None:
        row = {"part": part, "operation": operation, "source": self.tested, "wall_p50_ms": f"{1e3 * seconds:.0f}"}
        self.results.add([{**row, "extra": said[:240]}])

    def said(self, part: str, operation: str) -> str:
        """The outcome of a check for these sources; empty if it has not run."""
        rows = self.results.rows(part, self.tested)
        return next((row["extra"] for row in rows if row["operation"] == operation), "")


def find_sanitizer() -> str | None:
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    return shutil.which("compute-sanitizer") or next((place for place in places if os.access(place, os.X_OK)), None)


def tail(output: str, lines: int) -> list[str]:
    return [line[:200] for line in output.splitlines() if line.strip()][-lines:]
