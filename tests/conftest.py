"""Which backends this process tests, and poisoned output buffers.

A plain run tests the native backend on CPU tensors, and Triton on CUDA tensors where there is a GPU. With
TRITON_INTERPRET=1 in the environment it tests Triton's interpreter on CPU tensors instead; tests/interpreter starts
such a run.
"""

from __future__ import annotations

import os

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels.backends import backend as backend_module

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
CANDIDATES = [("triton", "cpu")] if INTERPRETED else [("native", "cpu")] + [("triton", "cuda")] * CUDA


def pytest_report_header() -> str:
    tested = " and ".join(f"{backend} on {device} tensors" for backend, device in CANDIDATES)
    return f"kernels under test: {tested}" + ("" if CUDA or INTERPRETED else "; there is no CUDA device for Triton")


@pytest.fixture(params=CANDIDATES, ids=lambda c: f"{c[0]}-{c[1]}")
def fast(request):
    """Puts one fast backend in use; its value is the device to make tensors on."""
    name, device = request.param
    reason = backend_module(name).why_off(torch.device(device))
    if reason:
        pytest.fail(f"the {name} backend is off: {reason}")
    with gk.use_backend(name):
        yield device


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fills every uninitialised tensor with NaN or the largest integer: an entry left unwritten fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
