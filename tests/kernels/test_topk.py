"""Row-wise top-K of every backend against the specification, and the specification against torch.topk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsel_kernels as gk
from gradsel_kernels import reference
from tests.kernels import cases

if sys.platform != "win32":
    import resource


def name(case):
    return getattr(case, "__name__", str(case)).removeprefix("torch.")


def check(grad, k, device):
    expected_cols, expected_bits = reference.topk_rows_bits(grad, k)
    grad = grad.to(device)
    before = grad.clone()
    cols = gk.topk_rows(grad, k)
    cols_again, bits = gk.topk_rows_bits(grad, k)
    assert cols.dtype == bits.dtype == torch.int32
    assert torch.equal(cols.cpu(), expected_cols)
    assert torch.equal(cols_again.cpu(), expected_cols)
    assert torch.equal(bits.cpu(), expected_bits)
    assert cases.same_bits(grad, before)


@pytest.mark.parametrize("values", cases.VALUES, ids=name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_matches_the_specification(fast, dtype, values):
    for shape in cases.SHAPES:
        grad = values(shape).to(dtype)
        for k in cases.ks(shape[1]):
            check(grad, k, fast)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_every_nan_is_the_same(fast, dtype):
    """Whatever its sign and payload: the lowest columns win."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    payload = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10, torch.float64: 52}[dtype]
    infinity = torch.tensor(float("inf"), dtype=dtype).view(integer)
    for shape in ((3, 40), (2, 300), (1, 3000)):
        sign = torch.randint(0, 2, shape).bool()
        nan = (infinity | torch.randint(1, 2**payload, shape).to(integer)).view(dtype)
        grad = torch.where(torch.rand(shape) < 0.3, torch.where(sign, -nan, nan), cases.normal(shape).to(dtype))
        for k in (1, 2, 9, 64):
            check(grad, k, fast)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_long_rows(fast, dtype):
    for shape in cases.LONG_SHAPES:
        for values in (cases.normal, cases.ties, cases.one_nan):
            grad = values(shape).to(dtype)
            for k in (1, 8, 64) if cases.INTERPRETED else (1, 5, 8, 64, 300):
                check(grad, k, fast)


@pytest.mark.parametrize("view", cases.VIEWS, ids=name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_strided_views(fast, dtype, view):
    for shape in cases.SHAPES:
        for k in (1, 4, 40):
            check(view(cases.normal(shape).to(dtype)), k, fast)


def one_in_sixteen(shape):
    """Large elements in every 16th column only: many come from one lane of a register."""
    grad = cases.normal(shape)
    grad[:, 5::16] *= 1e3
    return grad


@pytest.mark.skipif(cases.INTERPRETED, reason="the native backend")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_every_simd_level(native, dtype, level):
    native._C.limit_simd(level)
    for shape in ((1, 64), (2, 130), (3, 256), (7, 700), (4, 2100), (1, 9000)):
        for values in (*cases.VALUES, one_in_sixteen, lambda shape: cases.normal(shape).sort().values):
            grad = values(shape).to(dtype)
            for k in (1, 2, 3, 7, 8, 9, 16, 17, 60):
                check(grad, k, "cpu")


def test_offsets_past_two_to_the_31(fast):
    """Rows lie 2**31 elements apart; the memory between them is reserved, not used."""
    stride = 2**31 + 7
    storage = cases.reserved(stride + 64, fast)
    grad = storage.as_strided((2, 64), (stride, 1))
    grad.copy_(torch.randn(2, 64))
    assert torch.equal(gk.topk_rows(grad, 3).cpu(), reference.topk_rows(grad.cpu().clone(), 3))
    transposed = storage.as_strided((64, 2), (1, stride))
    assert torch.equal(gk.topk_rows(transposed, 1).cpu(), reference.topk_rows(grad.cpu().t().contiguous(), 1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a forked process")
def test_scratch_is_for_as_many_strided_rows_as_there_are():
    """One row whose columns are not contiguous, of 16 MiB, with 64 MiB left: 16 rows of scratch do not fit."""
    storage = torch.randn(2**23)
    grad = storage[::2].unsqueeze(0)
    with gk.use_backend("native"):
        expected = gk.topk_rows(grad.contiguous(), 3)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # the parent's threads are not here
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
                code = 0 if torch.equal(gk.topk_rows(grad, 3), expected) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(deadline=None, max_examples=60 if not cases.INTERPRETED else 10)
@given(data=st.data())
def test_any_small_integers(data):
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 80))
    numbers = data.draw(st.lists(st.integers(-4, 4), min_size=rows * cols, max_size=rows * cols))
    k = data.draw(st.integers(1, cols + 2))
    grad = torch.tensor(numbers, dtype=torch.float32).view(rows, cols)
    with gk.use_backend("triton" if cases.INTERPRETED else "native"):
        check(grad, k, "cpu")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_specification_keeps_the_magnitudes_of_torch_topk(dtype):
    grad = cases.normal((20, 300)).to(dtype)
    for k in (1, 7, 300):
        cols = reference.topk_rows(grad, k)
        kept = grad.abs().gather(1, cols.long()).sort(dim=1, descending=True).values
        assert torch.equal(kept, grad.abs().topk(k, dim=1).values)
        assert (cols.diff(dim=1) > 0).all()


def test_specification_breaks_ties_to_the_lowest_column_and_ranks_nan_first():
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([[1.0, -2.0, 2.0, 2.0], [0.0, inf, nan, -inf], [-0.0, 0.0, -0.0, 0.0], [nan, 1.0, -nan, nan]])
    assert reference.topk_rows(grad, 1).tolist() == [[1], [2], [0], [0]]
    assert reference.topk_rows(grad, 2).tolist() == [[1, 2], [1, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("grad", "k", "error", "message"),
    [
        (torch.ones(3), 1, ValueError, "grad.*2-D"),
        (torch.ones(2, 3, 4), 1, ValueError, r"grad.*\[2, 3, 4\]"),
        (torch.ones(2, 3), 0, ValueError, "k.*at least 1.* 0"),
        (torch.ones(2, 3), -1, ValueError, "k.*at least 1.*-1"),
        (torch.ones(2, 3, dtype=torch.int32), 1, TypeError, "grad.*int32"),
        (torch.ones(2, 3, dtype=torch.complex64), 1, TypeError, "grad.*complex"),
        (torch.ones(2, 3).to_sparse(), 1, TypeError, "grad.*dense"),
    ],
)
def test_bad_input(grad, k, error, message):
    for function in (gk.topk_rows, gk.topk_rows_bits):
        with pytest.raises(error, match=message):
            function(grad, k)
