"""The backends that MaskedAdam is tested with."""

from __future__ import annotations

import pytest

import gradsel_kernels as gk


@pytest.fixture(params=["reference", "native"])
def backend(request):
    with gk.use_backend(request.param):
        yield request.param
