"""Which backends this process tests, and poisoned output buffers.

A plain run tests the native backend on CPU tensors, and Triton and CUDA C++ on CUDA tensors where there is a GPU. With
TRITON_INTERPRET=1 in the environment it tests Triton's interpreter on CPU tensors instead, with GRADSEL_EMULATE_CUDA=1
the CUDA C++ kernels on an emulated GPU; tests/interpreter and tests/cuda start such runs.
"""

from __future__ import annotations

import os

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels.backends import backend as backend_module
from tests.cuda.build import build_product

pytest_plugins = ["tests.support.matrix_plugin"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("GRADSEL_EMULATE_CUDA") == "1"
CUDA = torch.cuda.is_available()
ON_CUDA = [("triton", "cuda"), ("cuda", "cuda")] if CUDA else []
CANDIDATES = [("native", "cpu"), *ON_CUDA]
if INTERPRETED or EMULATED:
    CANDIDATES = [("triton" if INTERPRETED else "cuda", "cpu")]


def pytest_report_header() -> str:
    tested = " and ".join(f"{backend} on {device} tensors" for backend, device in CANDIDATES)
    return f"kernels under test: {tested}" + "; there is no CUDA device for the others" * (not CUDA)


@pytest.fixture(scope="session")
def emulated():
    """Replaces the GPU of the cuda backend by an emulated one; its value is the module with the emulator's settings."""
    module = build_product()
    cuda = backend_module("cuda")
    cuda._C, cuda.why_off = module, lambda device: None
    module.set_schedule(2, 1)  # at random
    return module


@pytest.fixture(params=CANDIDATES, ids=lambda c: f"{c[0]}-{c[1]}")
def fast(request):
    """Puts one fast backend in use; its value is the device to make tensors on."""
    name, device = request.param
    if EMULATED:
        request.getfixturevalue("emulated")
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
