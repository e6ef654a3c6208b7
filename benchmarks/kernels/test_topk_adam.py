"""The fused first step against top-K alone and against the operators that it fuses, one after the other."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

#: The matrices of two blocks of ViT-B/16.
SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_step(contest, dtype):
    torch.manual_seed(0)
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    read = sum(grad.nbytes for grad in grads)

    def separate(k: int) -> None:
        cols = [gk.topk_rows_bits(grad, k)[0] for grad in grads]
        moments = [torch.zeros(2, *index.shape) for index in cols]
        gk.masked_adam_(
            weights, grads, [m[0] for m in moments], [m[1] for m in moments], [torch.zeros(()) for _ in cols],
            lr=1e-6, indices=cols, layouts=[gk.Layout.COLS] * len(cols),
        )  # fmt: skip

    contenders = {}
    for k in (1, 8, 64):
        entries = sum(shape[0] * k for shape in SHAPES)
        contenders[k] = {
            "top-K alone": (lambda k=k: [gk.topk_rows(grad, k) for grad in grads], read),
            "top-K with bits": (lambda k=k: [gk.topk_rows_bits(grad, k) for grad in grads], read),
            "the three operators": (lambda k=k: separate(k), read + 24 * entries),
            "native": (lambda k=k: gk.topk_masked_adam_(weights, grads, k, lr=1e-6), read + 24 * entries),
        }
    contest("topk_masked_adam_", "2 blocks of ViT-B", str(dtype).removeprefix("torch."), contenders)
