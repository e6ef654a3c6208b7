"""Row-wise top-K and the packed bitmask that falls out of it, against torch.topk, a plain sum and argpartition."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

SIZES = [(3072, 768), (4096, 14336)]


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_topk(compare, size, dtype, k):
    torch.manual_seed(0)
    grad = torch.randn(size).to(dtype)
    expected = grad.abs().topk(k, 1).values.sort(1).values
    assert torch.equal(grad.abs().gather(1, gk.topk_rows(grad, k).long()).sort(1).values, expected)
    bits = size[0] * ((size[1] + 31) // 32) * 4
    cols = size[0] * k * 4
    compare(
        "topk_rows",
        f"{size[0]}x{size[1]}",
        str(dtype).removeprefix("torch."),
        k,
        {
            "g.abs().topk": (lambda: grad.abs().topk(k, 1), grad.nbytes),
            "g.sum": (lambda: grad.sum(), grad.nbytes),
            "native, with bits": (lambda: gk.topk_rows_bits(grad, k), grad.nbytes + cols + bits),
            "native": (lambda: gk.topk_rows(grad, k), grad.nbytes + cols),
        },
    )


@pytest.mark.parametrize("k", [1])
def test_topk_of_a_transposed_view(compare, k):
    """transformers' Conv1D keeps [in, out]: its neuron view is a transposed one."""
    torch.manual_seed(0)
    grad = torch.randn(768, 3072).t()
    compare(
        "topk_rows, transposed",
        "3072x768",
        "float32",
        k,
        {
            "g.abs().topk": (lambda: grad.abs().topk(k, 1), grad.nbytes),
            "native": (lambda: gk.topk_rows(grad, k), grad.nbytes),
        },
    )
