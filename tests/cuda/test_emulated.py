"""Runs the tests of the CUDA C++ kernels on an emulated GPU, in a process of its own: what is out of bounds ends it.

Threads take turns in a random order, so that a missing barrier changes results; shared memory and the tensors of
test_bounds.py end at a page that cannot be read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.build import why_not

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/kernels/test_topk.py",
    "tests/kernels/test_adam.py",
    "tests/kernels/test_adam_bad_input.py",
    "tests/kernels/test_adam_capture.py",
    "tests/kernels/test_adam_low_precision.py",
    "tests/kernels/test_adam_scaling.py",
    "tests/kernels/test_adam_specification.py",
    "tests/kernels/test_topk_adam.py",
    "tests/cuda/test_bounds.py",
    "tests/cuda/test_backend.py",
    "tests/gpu/test_kernels.py",
)


@pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")
@pytest.mark.skipif(os.environ.get("GRADSEL_EMULATE_CUDA") == "1", reason="this is the process with the emulator")
def test_kernels_on_an_emulated_gpu():
    environment = {**os.environ, "GRADSEL_EMULATE_CUDA": "1", "GRADSEL_GPU_TESTS_ON": "cpu"}
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", "-k", "not every_run"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 600
