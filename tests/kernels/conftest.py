"""Square roots that are rounded correctly, and the native backend at every SIMD level."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels.backends import native as backend
from tests.kernels.adam_cases import exact_sqrt


@pytest.fixture
def exact_root(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)


@pytest.fixture
def native():
    """The native backend, in use. Afterwards it may use all that the processor has, whatever a test has limited."""
    if backend.why_off(torch.device("cpu")):
        pytest.fail("the native backend is off")
    with gk.use_backend("native"):
        yield backend
    backend._C.limit_simd("avx512")
