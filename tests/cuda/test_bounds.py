"""The CUDA C++ kernels touch no memory that is not theirs: tensors begin after an unreadable page, or end at one."""

from __future__ import annotations

import ctypes
import math
import os

import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout, reference
from gradsel_kernels.backends import cuda

pytestmark = pytest.mark.skipif(
    os.environ.get("GRADSEL_EMULATE_CUDA") != "1", reason="runs in the process that test_emulated.py starts"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def guarded(emulated):
    """Copies a tensor to memory between two unreadable pages: right before the second, or right after the first."""
    addresses = []

    def copy(tensor: Tensor, *, at_end: bool) -> Tensor:
        size = max(1, tensor.nbytes)
        room = size if at_end else math.ceil(size / PAGE) * PAGE
        addresses.append(emulated.guarded(room))
        memory = (ctypes.c_char * room).from_address(addresses[-1])
        return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)

    yield copy
    for address in addresses:
        emulated.release(address)


@pytest.mark.parametrize("at_end", [False, True], ids=["at the start", "at the end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(emulated, guarded, dtype, at_end):
    for rows, n in ((1, 1), (2, 7), (3, 768), (1, 1025), (5, 33), (2, 4100)):
        grad = guarded(torch.randn(rows, n, dtype=torch.float64).to(dtype), at_end=at_end)
        for k in (1, 2, 64, 65, n):
            if k > n:
                continue
            cols = guarded(torch.full((rows, k), -1, dtype=torch.int32), at_end=at_end)
            bits = guarded(torch.full((rows, (n + 31) // 32), -1, dtype=torch.int32), at_end=at_end)
            emulated.cuda_topk_rows(
                grad.data_ptr(), grad.element_size(), cuda._NAN[dtype], rows, n, *grad.stride(), k,
                cols.data_ptr(), bits.data_ptr(), 0, 0,
            )  # fmt: skip
            expected = reference.topk_rows_bits(grad, k)
            assert torch.equal(cols, expected[0])
            assert torch.equal(bits, expected[1])


@pytest.mark.parametrize("at_end", [False, True], ids=["at the start", "at the end"])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_adam(fast, guarded, dtype, layout, at_end):
    state = torch.float64 if dtype is torch.float64 else torch.float32
    for rows, n, k in ((1, 1, 1), (3, 5, 2), (7, 33, 4), (40, 70, 30)):
        weight, grad = (torch.randn(rows, n, dtype=torch.float64).to(dtype) for _ in range(2))
        cols = torch.rand(rows, n).topk(k).indices.sort(dim=1).values.to(torch.int32)
        mask = torch.zeros(rows, n, dtype=torch.bool).scatter_(1, cols.long(), True)
        index, shape = {
            Layout.ALL: (None, (rows, n)),
            Layout.COLS: (cols, (rows, k)),
            Layout.FLAT: (mask.view(-1).nonzero().view(-1), (rows * k,)),
        }[layout]
        for compact in (False, True):
            tensors = [
                weight,
                grad.new_ones(shape) if compact else grad,
                torch.zeros(shape, dtype=state),
                torch.zeros(shape, dtype=state),
                torch.zeros((), dtype=torch.float32),
            ]
            here = [guarded(tensor, at_end=at_end) for tensor in tensors]
            placed = None if index is None else guarded(index, at_end=at_end)
            options = {"lr": 0.1, "layouts": [layout]}
            gk.masked_adam_(*([tensor] for tensor in here), indices=[placed], **options)
            with gk.use_backend("reference"):
                gk.masked_adam_(*([tensor] for tensor in tensors), indices=[index], **options)
            for found, expected in zip(here, tensors, strict=True):
                torch.testing.assert_close(found, expected)
