"""Products with selected entries, of every backend, against the specification and against a dense product."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import reference
from gradsel_kernels._checks import sum_dtype
from tests.kernels import cases

TOKENS = (0, 1, 2, 5) if cases.INTERPRETED else (0, 1, 2, 15, 16, 17, 40)
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}


def ragged(rows, n):
    """Columns and offsets of rows with different numbers of entries, some with none."""
    counts = torch.randint(0, min(n, 4) + 1, (rows,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    cols = [cases.random_cols(1, n, int(count)).view(-1) for count in counts]
    return torch.cat([torch.empty(0, dtype=torch.int32), *cols]), offsets


def dense(cols, values, n, offsets=None):
    """D in float64."""
    rows = cols.shape[0] if offsets is None else offsets.shape[0] - 1
    counts = torch.full((rows,), cols[0].numel() if rows else 0) if offsets is None else offsets.diff()
    made = torch.zeros(rows, n, dtype=torch.float64)
    made[torch.arange(rows).repeat_interleave(counts), cols.reshape(-1).long()] = values.double().reshape(-1)
    return made


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
def test_a_dense_product(fast, dtype, view):
    for rows, n in cases.SHAPES:
        for tokens in TOKENS:
            output, input = cases.normal((tokens, rows)).to(dtype), cases.normal((tokens, n)).to(dtype)
            choices = [(cases.random_cols(rows, n, k), None) for k in (0, 1, 3)] + [ragged(rows, n)]
            for cols, offsets in choices:
                values = cases.normal(tuple(cols.shape)).to(sum_dtype(dtype))
                expected = output.double() + input.double() @ dense(cols, values, n, offsets).T
                there = view(output.to(fast).clone())
                version = there._version
                given = (view(input.to(fast)), cols.to(fast), values.to(fast))
                row_offsets = None if offsets is None else offsets.to(fast)
                assert gk.selected_addmm_(there, *given, row_offsets=row_offsets) is there
                assert there._version > version
                largest = float(expected.abs().max()) if expected.numel() else 0.0
                torch.testing.assert_close(
                    there.cpu().double(), expected, rtol=RELATIVE[dtype], atol=RELATIVE[dtype] * max(largest, 1.0)
                )
                specified = output.clone()
                reference.selected_addmm_(specified, input, cols, values, offsets)
                torch.testing.assert_close(there.cpu(), specified, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])


def test_columns_that_are_not_selected_are_not_read(fast):
    input = torch.full((3, 8), float("nan"), device=fast)
    input[:, 2] = 1.0
    input[1, 2] = float("inf")
    output = torch.ones(3, 2, device=fast)
    cols = torch.tensor([[2], [2]], dtype=torch.int32, device=fast)
    gk.selected_addmm_(output, input, cols, torch.tensor([[2.0], [0.0]], device=fast))
    assert output[::2].tolist() == [[3.0, 1.0], [3.0, 1.0]]
    assert output[1, 0] == float("inf")
    assert output[1, 1].isnan()


def test_a_sum_is_rounded_once(fast):
    output = torch.ones(1, 1, dtype=torch.bfloat16, device=fast)
    input = torch.ones(1, 4, dtype=torch.bfloat16, device=fast)
    cols = torch.arange(4, dtype=torch.int32, device=fast).view(1, 4)
    gk.selected_addmm_(output, input, cols, torch.full((1, 4), 2.0**-9, device=fast))  # each of them would be lost
    assert output.item() == 1 + 2.0**-7


@pytest.mark.skipif(cases.INTERPRETED, reason="the interpreter takes minutes")
def test_many_rows_in_threads(fast):
    input, output = torch.randn(20, 3000, device=fast), torch.randn(20, 7001, device=fast)
    cols, values = cases.random_cols(7001, 3000, 7).to(fast), torch.randn(7001, 7, device=fast)
    expected = output.double() + input.double() @ dense(cols.cpu(), values.cpu(), 3000).T.to(fast)
    gk.selected_addmm_(output, input, cols, values)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
def test_columns_out_of_range(fast, bad):
    input, output = torch.ones(2, 40, device=fast), torch.zeros(2, 6, device=fast)
    cols = cases.random_cols(6, 40, 3).to(fast)
    cols[4, 1] = bad
    call = (output, input, cols, torch.ones(6, 3, device=fast))
    if fast == "cpu" and not cases.INTERPRETED:
        with pytest.raises(IndexError, match=r"cols.* 0 to 39"):
            gk.selected_addmm_(*call)
        assert torch.equal(output, torch.zeros(2, 6))
        with gk.use_backend("reference"), pytest.raises(IndexError, match=r"cols.* 0 to 39"):
            gk.selected_addmm_(*call)
        return
    gk.selected_addmm_(*call)
    assert output.isnan().sum(0).tolist() == [0, 0, 0, 0, 2, 0]


@pytest.mark.parametrize("offsets", [[0, 1, 3], [1, 1, 2], [0, 2, 1]])
def test_offsets_that_do_not_cut_the_entries(offsets):
    cols = torch.zeros(2, dtype=torch.int32)
    output = torch.zeros(1, 2)
    for backend in (None, "reference"):
        with gk.use_backend(backend), pytest.raises(IndexError, match="row_offsets must ascend from 0 to 2"):
            gk.selected_addmm_(output, torch.ones(1, 3), cols, torch.ones(2), row_offsets=torch.tensor(offsets))
    assert torch.equal(output, torch.zeros(1, 2))


COLS = torch.zeros(2, 1, dtype=torch.int32)


def given(output=(4, 2), input=(4, 3), cols=COLS, values=(2, 1), **options):
    return (torch.ones(output), torch.ones(input), cols, torch.ones(values)), options


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (given(output=(4, 2, 1)), ValueError, "output.*2-D"),
        (given(input=(3, 3)), ValueError, r"input \[3, 3\] and output \[4, 2\].*tokens"),
        (given(cols=COLS.long()), TypeError, "cols.*int32.*int64"),
        (given(output=(4, 3)), ValueError, "cols has 2 rows, but output has 3"),
        (given(values=(2, 2)), ValueError, r"values must have the shape of cols \[2, 1\], got \[2, 2\]"),
        (given(cols=COLS[:, 0], values=(2,), row_offsets=torch.zeros(2).long()), ValueError, r"row_offsets.*\[3\]"),
        (((torch.ones(1, 2).expand(4, 2), *given()[0][1:]), {}), ValueError, "output.*stride 0"),
        (((torch.ones(4, 2).half(), *given()[0][1:]), {}), TypeError, "input is torch.float32.*output is.*16"),
        (((*given()[0][:3], torch.ones(2, 1).double()), {}), TypeError, "values must be torch.float32"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        gk.selected_addmm_(*call[0], **call[1])


def test_it_is_not_differentiable():
    arguments, _ = given()
    with pytest.raises(RuntimeError, match=r"selected_addmm_.*torch\.no_grad"):
        gk.selected_addmm_(arguments[0], arguments[1].requires_grad_(), *arguments[2:])
