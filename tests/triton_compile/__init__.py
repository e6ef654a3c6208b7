"""Every Triton kernel compiled for real, without a GPU; skipped where Triton is missing or interprets kernels."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)
