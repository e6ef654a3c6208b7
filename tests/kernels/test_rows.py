"""Gather and scatter of every backend against the specification."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import reference
from tests.kernels import cases


@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gather_and_scatter(fast, dtype, view):
    for shape in cases.SHAPES:
        for k in (0, 1, 3, 300):
            weight = cases.special(shape).to(dtype)
            cols = cases.random_cols(*shape, k)
            expected = reference.gather_rows(weight, cols)
            there = view(weight.to(fast))
            assert cases.same_bits(gk.gather_rows(there, cols.to(fast)).cpu(), expected)

            values = cases.normal(tuple(cols.shape)).to(dtype)
            reference.scatter_rows_(weight, cols, values)
            version = there._version
            assert gk.scatter_rows_(there, cols.to(fast), values.to(fast)) is there
            assert there._version > version
            assert cases.same_bits(there.cpu(), weight)


@pytest.mark.parametrize("weight_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("value_dtype", cases.DTYPES, ids=str)
def test_scatter_rounds_as_torch_converts(fast, weight_dtype, value_dtype):
    values = torch.cat([cases.normal((8, 300)), cases.special((8, 300)), 1e6 * cases.normal((8, 300))]).to(value_dtype)
    cols = torch.arange(300, dtype=torch.int32).expand(24, 300)
    weight = torch.zeros(24, 300, dtype=weight_dtype, device=fast)
    gk.scatter_rows_(weight, cols.to(fast), values.to(fast))
    expected = values.to(weight_dtype)
    nan = expected.isnan()
    assert torch.equal(weight.cpu().isnan(), nan)
    assert cases.same_bits(weight.cpu()[~nan], expected[~nan])


def test_no_gradient_flows(fast):
    weight = torch.ones(2, 3, device=fast, requires_grad=True)
    assert not gk.gather_rows(weight, COLS.to(fast)).requires_grad
    with pytest.raises(RuntimeError, match=r"scatter_rows_.*torch\.no_grad"):
        gk.scatter_rows_(2 * weight, COLS.to(fast), torch.ones(2, 1, device=fast))


def test_strided_columns(fast):
    weight = cases.normal((6, 40)).float()
    cols = cases.random_cols(6, 40, 5)
    for view in cases.VIEWS:
        assert torch.equal(gk.gather_rows(weight.to(fast), view(cols.to(fast))).cpu(), weight.gather(1, cols.long()))


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
def test_columns_out_of_range(fast, bad):
    weight = torch.arange(240.0, device=fast).view(6, 40)
    cols = cases.random_cols(6, 40, 3).to(fast)
    cols[4, 1] = bad
    before = weight.clone()
    if fast == "cpu" and not cases.INTERPRETED:
        with pytest.raises(IndexError, match=r"cols.* 0 to 39"):
            gk.gather_rows(weight, cols)
        with pytest.raises(IndexError, match=r"cols.* 0 to 39"):
            gk.scatter_rows_(weight, cols, torch.zeros_like(cols, dtype=torch.float32))
        assert torch.equal(weight, before)
        return
    gathered = gk.gather_rows(weight, cols)
    assert gathered[4, 1].isnan()
    assert int(gathered.isnan().sum()) == 1
    gk.scatter_rows_(weight, cols, torch.full_like(gathered, -1.0))
    assert int((weight == -1).sum()) == cols.numel() - 1


@pytest.mark.parametrize("bad", [-1, 3])
def test_specification_refuses_columns_out_of_range(bad):
    weight = torch.ones(2, 3)
    cols = torch.tensor([[0], [bad]], dtype=torch.int32)
    with gk.use_backend("reference"):
        with pytest.raises(IndexError, match=r"cols.* 0 to 2"):
            gk.gather_rows(weight, cols)
        with pytest.raises(IndexError, match=r"cols.* 0 to 2"):
            gk.scatter_rows_(weight, cols, torch.zeros(2, 1))
    assert torch.equal(weight, torch.ones(2, 3))


COLS = torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.gather_rows(torch.ones(2, 3), COLS.long()), TypeError, "cols.*int32.*int64"),
        (lambda: gk.gather_rows(torch.ones(3, 3), COLS), ValueError, "cols.* 2 .*weight.* 3"),
        (lambda: gk.gather_rows(torch.ones(2, 3, 1), COLS), ValueError, "weight.*2-D"),
        (lambda: gk.gather_rows(torch.ones(2, 3, device="meta"), COLS), ValueError, "weight.*meta"),
        (lambda: gk.scatter_rows_(torch.ones(2, 3), COLS, torch.ones(2, 2)), ValueError, r"cols \[2, 1\]"),
        (lambda: gk.scatter_rows_(torch.ones(1, 3).expand(2, 3), COLS, torch.ones(2, 1)), ValueError, "stride 0"),
        (lambda: gk.scatter_rows_(torch.ones(2, 3), COLS, COLS), TypeError, "values.*float32.*int32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
