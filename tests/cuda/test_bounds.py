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
from gradsel_kernels._ops import OPS
from gradsel_kernels.adam_item import CODES

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
                grad.data_ptr(), CODES[dtype], rows, n, *grad.stride(), k,
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


@pytest.mark.parametrize("at_end", [False, True], ids=["at the start", "at the end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_masked_adam(fast, emulated, guarded, dtype, at_end):
    """All that the operator writes lies at a page that cannot be touched."""
    state = torch.float64 if dtype is torch.float64 else torch.float32
    half = dtype in (torch.bfloat16, torch.float16)
    for rows, n in ((1, 1), (3, 33), (2, 1025), (5, 200)):
        for k in (1, 3, 66):
            if k > n:
                continue
            shape = (rows, k)
            grad = guarded(torch.randn(rows, n, dtype=torch.float64).to(dtype), at_end=at_end)
            weight = torch.randn(rows, n, dtype=torch.float64).to(dtype)
            expected = weight.clone()
            here = guarded(weight, at_end=at_end)
            made = [guarded(torch.full(shape, 9, dtype=state), at_end=at_end) for _ in range(4)]
            lost = [guarded(torch.full(shape, 9, dtype=dtype), at_end=at_end)] if half else None
            step, cols, bits = (
                guarded(torch.full(size, 9, dtype=kind), at_end=at_end)
                for size, kind in (((), torch.float32), (shape, torch.int32), ((rows, (n + 31) // 32), torch.int32))
            )
            OPS.topk_masked_adam_.default(
                [here], [], [grad], *([tensor] for tensor in made), [step], [cols], [bits], lr=0.1, beta1=0.9,
                beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled_weight_decay=True, maximize=False, anchor=0.1,
                anchor_l1=False, anchor_decoupled=False, compensations=lost,
            )  # fmt: skip
            with gk.use_backend("reference"):
                first = gk.topk_masked_adam_(
                    [expected], [grad], k, lr=0.1, beta2=0.99, weight_decay=0.1, decoupled_weight_decay=True,
                    amsgrad=True, anchor=0.1, low_precision="kahan",
                )  # fmt: skip
            torch.testing.assert_close(here, expected)
            assert torch.equal(cols, first.cols[0])
            assert torch.equal(bits, first.bits[0])
            assert step == 1
            theirs = (first.exp_avgs, first.exp_avg_sqs, first.max_exp_avg_sqs, first.originals)
            for found, (right,) in zip(made, theirs, strict=True):
                torch.testing.assert_close(found, right)
