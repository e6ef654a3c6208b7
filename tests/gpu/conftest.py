"""Where tensors live, and the backends under test. One place decides that there is nothing to run on."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels.backends import backend as backend_module
from tests.conftest import EMULATED
from tests.gpu import BACKENDS, ON_CPU


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    if ON_CPU:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return "cuda"


def _in_use(name: str, device: str):
    reason = backend_module(name).why_off(torch.device(device))
    if reason:
        pytest.fail(f"the {name} backend is off: {reason}")
    return gk.use_backend(name)


@pytest.fixture(params=BACKENDS)
def kernels(request, device):
    """Puts a backend in use; its value is the name."""
    if EMULATED:
        request.getfixturevalue("emulated")
    with _in_use(request.param, device):
        yield request.param


@pytest.fixture
def float32_is_float32():
    """No tf32 in convolutions and products, whose 11 bits no comparison would survive."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = products
