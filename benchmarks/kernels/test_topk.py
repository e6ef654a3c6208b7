"""Row-wise top-K, and the packed bitmask that is made along with it, against torch.topk and a plain sum."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

SIZES = [(3072, 768), (4096, 14336)]
KS = (1, 2, 4, 8, 16, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_topk(contest, size, dtype):
    torch.manual_seed(0)
    grad = torch.randn(size).to(dtype)
    bits = size[0] * ((size[1] + 31) // 32) * 4
    contenders = {0: {"g.sum": (lambda: grad.sum(), grad.nbytes)}}
    for k in KS:
        expected = grad.abs().topk(k, 1).values.sort(1).values
        assert torch.equal(grad.abs().gather(1, gk.topk_rows(grad, k).long()).sort(1).values, expected)
        cols = size[0] * k * 4
        contenders[k] = {
            "g.abs().topk": (lambda k=k: grad.abs().topk(k, 1), grad.nbytes),
            "native, with bits": (lambda k=k: gk.topk_rows_bits(grad, k), grad.nbytes + cols + bits),
            "native": (lambda k=k: gk.topk_rows(grad, k), grad.nbytes + cols),
        }
    contest("topk_rows", f"{size[0]}x{size[1]}", str(dtype).removeprefix("torch."), contenders)


def test_topk_of_a_transposed_view(contest):
    """transformers' Conv1D keeps its weight as [in, out], so its neuron view is a transposed one."""
    torch.manual_seed(0)
    grad, k = torch.randn(768, 3072).t(), 1
    providers = {
        "g.abs().topk": (lambda: grad.abs().topk(k, 1), grad.nbytes),
        "native": (lambda: gk.topk_rows(grad, k), grad.nbytes),
    }
    contest("topk_rows, transposed", "3072x768", "float32", {k: providers})
