"""Square roots that are rounded correctly."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.adam_cases import exact_sqrt


@pytest.fixture
def exact_root(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)
