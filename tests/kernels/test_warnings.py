"""Warnings point at the user's code, whatever lies between it and the library."""

from __future__ import annotations

import warnings

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import backends


@pytest.fixture
def native_is_off(monkeypatch):
    monkeypatch.setattr(backends.backend("native"), "broken", "it was not built.")
    monkeypatch.setattr(backends, "_told", set())
    with gk.use_backend(None):  # forgets the choice made before
        yield
    gk.use_backend(None)


@pytest.mark.usefixtures("native_is_off")
@pytest.mark.parametrize("by_way_of_torch", [False, True])
def test_a_missing_backend_warns_at_the_call(by_way_of_torch):
    class Layer(torch.nn.Module):
        forward = staticmethod(gk.topk_rows)

    call = Layer() if by_way_of_torch else gk.topk_rows
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(torch.ones(2, 3), 1)
        call(torch.ones(2, 3), 1)
    assert [warning.filename for warning in caught] == [__file__]
    assert "native backend: it was not built." in str(caught[0].message)
