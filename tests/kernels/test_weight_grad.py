"""Selected weight gradients of every backend and strategy against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import reference
from gradsel_kernels._checks import STRATEGIES, sum_dtype
from tests.kernels import cases

#: (tokens, rows, n, k)
PROBLEMS = [(1, 1, 1, 1), (7, 5, 3, 2), (33, 17, 31, 1), (50, 64, 96, 3), (129, 40, 33, 33), (255, 19, 7, 5)]
LARGE = [(1100, 130, 70, 1), (700, 96, 300, 10), (64, 515, 129, 4)]
EMPTY = [(0, 5, 4, 2), (6, 0, 4, 2), (6, 5, 4, 0), (6, 5, 0, 0)]
#: (tokens, rows, n), of rows with different numbers of entries
RAGGED = [(40, 23, 31), (9, 3, 1), (130, 70, 50)]
if cases.INTERPRETED:
    PROBLEMS, LARGE, RAGGED = PROBLEMS[:4], [(140, 40, 50, 3)], [(40, 23, 31), (9, 3, 1), (70, 66, 12)]


def name(case):
    return getattr(case, "__name__", str(case)).removeprefix("torch.")


def offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def check(grad_output, input, cols, device, strategy, row_offsets=None):
    """The error against float64 is no larger than that of torch's own dense product in float32, plus epsilon."""
    grad_output, input = grad_output.to(device), input.to(device)
    before = grad_output.clone(), input.clone()
    where = (cols.to(device), strategy)
    offsets = None if row_offsets is None else row_offsets.to(device)
    grad = gk.selected_weight_grad(grad_output, input, *where, row_offsets=offsets)
    again, bias = gk.selected_weight_grad_bias(grad_output, input, *where, row_offsets=offsets)
    total = sum_dtype(grad_output.dtype)
    assert grad.dtype == bias.dtype == total
    assert grad.shape == cols.shape
    assert cases.same_bits(grad, again)
    assert cases.same_bits(grad, gk.selected_weight_grad(grad_output, input, *where, row_offsets=offsets))
    assert cases.same_bits(grad_output, before[0])
    assert cases.same_bits(input, before[1])

    wide = grad_output.double().cpu(), input.double().cpu()
    truth = reference.selected_weight_grad(*wide, cols, row_offsets, "auto")
    scale = reference.selected_weight_grad(wide[0].abs(), wide[1].abs(), cols, row_offsets, "auto")
    torchs = reference.selected_weight_grad(wide[0].to(total), wide[1].to(total), cols, row_offsets, "auto")
    eps = torch.finfo(total).eps
    allowed = (torchs.double() - truth).abs().max() if truth.numel() else 0
    assert ((grad.double().cpu() - truth).abs() <= allowed + 4 * eps * scale).all()
    sums = wide[0].flatten(0, -2).sum(0)
    assert ((bias.double().cpu() - sums).abs() <= 8 * eps * wide[0].flatten(0, -2).abs().sum(0)).all()


def inputs(tokens, rows, n, dtype=torch.float32, batch=None):
    lead = (tokens,) if batch is None else (batch, tokens)
    grad_output = torch.randn(*lead, rows, dtype=torch.float64).to(dtype)
    return grad_output, torch.randn(*lead, n, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_matches_the_specification(fast, dtype, strategy):
    for tokens, rows, n, k in PROBLEMS + LARGE + EMPTY:
        check(*inputs(tokens, rows, n, dtype), cases.random_cols(rows, n, k), fast, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_batches(fast, dtype, strategy):
    for batch, tokens, rows, n, k in [(3, 49, 17, 20, 2), (1, 5, 3, 4, 1), (0, 5, 3, 4, 1), (40, 2, 33, 9, 3)]:
        check(*inputs(tokens, rows, n, dtype, batch), cases.random_cols(rows, n, k), fast, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_rows_that_use_neighbouring_columns(fast, dtype, strategy):
    """Several tiles in every direction, most of which hold no selected entry."""
    tokens, rows, n = 300, 150, 280
    cols = torch.arange(rows).unsqueeze(1) * n // rows + torch.tensor([[0, 3]])
    check(*inputs(tokens, rows, n, dtype), cols.clamp(max=n - 1).to(torch.int32), fast, strategy)


def token_contiguous(activations: Tensor) -> Tensor:
    return activations.mT.contiguous().mT


def spaced(activations: Tensor) -> Tensor:
    shape = [2 * size for size in activations.shape]
    return torch.zeros(shape, dtype=activations.dtype)[tuple(slice(None, None, 2) for _ in shape)].copy_(activations)


def expanded(activations: Tensor) -> Tensor:
    """What ``output.sum().backward()`` hands to a layer: one number for all."""
    return activations[..., :1, :1].expand(activations.shape)


VIEWS = (token_contiguous, spaced, expanded)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("batch", [None, 3])
def test_strided_views(fast, batch, dtype, strategy):
    grad_output, input = inputs(50, 37, 30, dtype, batch)
    cols = cases.random_cols(37, 30, 2)
    for left in (name_view(grad_output) for name_view in VIEWS):
        check(left, input, cols, fast, strategy)
        check(left, token_contiguous(input), cols, fast, strategy)
    check(grad_output, spaced(input), cols, fast, strategy)
    check(grad_output, expanded(input), cols.t().contiguous().t(), fast, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_rows_of_different_length(fast, dtype, strategy):
    for tokens, rows, n in RAGGED:
        counts = torch.randint(0, n + 1, (rows,)) * (torch.rand(rows) < 0.7)
        cols = torch.cat([torch.randperm(n)[:count].sort().values for count in counts.tolist()] or [counts])
        check(*inputs(tokens, rows, n, dtype), cols.to(torch.int32), fast, strategy, offsets_of(counts))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_columns_may_repeat_and_need_no_order(fast, strategy):
    grad_output, input = inputs(60, 20, 11)
    check(grad_output, input, torch.randint(0, 11, (20, 5), dtype=torch.int32), fast, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_what_is_not_selected_does_not_leak(fast, dtype, strategy):
    """NaN and infinity in an unused column, or in another row of the gradient, stay where they are."""
    grad_output, input = inputs(70, 33, 20, dtype)
    cols = cases.random_cols(33, 19, 2)
    expected = gk.selected_weight_grad(grad_output.to(fast), input.to(fast), cols.to(fast), strategy)
    input[:, 19] = torch.tensor([float("nan"), float("inf")]).repeat(35)
    grad_output[3, 32] = float("nan")
    found = gk.selected_weight_grad(grad_output.to(fast), input.to(fast), cols.to(fast), strategy)
    assert cases.same_bits(found[:32], expected[:32])
    assert found[32].isnan().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_summed_in_float32(fast, strategy):
    """4096 ones: a bfloat16 sum would stick at 256."""
    ones = torch.ones(4096, 5, dtype=torch.bfloat16, device=fast)
    cols = torch.tensor([[0], [1], [2], [3], [4]], dtype=torch.int32, device=fast)
    grad, bias = gk.selected_weight_grad_bias(ones, ones, cols, strategy)
    assert (grad == 4096).all()
    assert (bias == 4096).all()


@pytest.mark.skipif(cases.INTERPRETED, reason="one thread")
def test_the_number_of_threads_changes_no_bit(fast):
    threads = torch.get_num_threads()
    grad_output, input = (tensor.to(fast) for tensor in inputs(900, 300, 80))
    cols = cases.random_cols(300, 80, 3).to(fast)
    one_sum = cols[:, :1]
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gk.selected_weight_grad(grad_output, input, cols, "gather"))
            found.append(gk.selected_weight_grad(grad_output, input, one_sum, "gather"))
        for i in (2, 4):
            assert cases.same_bits(found[i], found[0])
            assert cases.same_bits(found[i + 1], found[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_take_columns(fast, dtype):
    for shape in [(9, 20), (300, 33), (0, 4), (5, 0), (3, 49, 20), (2, 0, 3), (1, 1, 1)]:
        input = torch.randn(shape, dtype=torch.float64).to(dtype)
        for count in {0, min(1, shape[-1]), shape[-1] // 2, shape[-1]}:
            columns = torch.randperm(shape[-1])[:count].sort().values.to(torch.int32)
            for view in (torch.clone, token_contiguous, spaced):
                expected = reference.take_columns(input, columns)
                taken = gk.take_columns(view(input).to(fast), columns.to(fast))
                assert taken.is_contiguous()
                assert cases.same_bits(taken.cpu(), expected)


def test_columns_out_of_range(fast):
    grad_output, input = (tensor.to(fast) for tensor in inputs(20, 4, 6))
    for bad in (6, -1, 2**31 - 1):
        cols = torch.tensor([[0, 1], [2, 3], [4, bad], [5, 0]], dtype=torch.int32, device=fast)
        columns = cols.view(-1)
        if fast == "cpu" and not cases.INTERPRETED:
            for strategy in STRATEGIES:
                with pytest.raises(IndexError, match=r"cols.* 0 to 5"):
                    gk.selected_weight_grad(grad_output, input, cols, strategy)
            with pytest.raises(IndexError, match=r"columns.* 0 to 5"):
                gk.take_columns(input, columns)
        else:
            found = gk.selected_weight_grad(grad_output, input, cols, "gather")
            assert found.isnan().view(-1).tolist() == [i == 5 for i in range(8)]
            assert gk.take_columns(input, columns).isnan().all(1).tolist() == [i == 5 for i in range(8)]


@pytest.mark.parametrize("strategy", ["auto", "tile"])
def test_columns_out_of_range_in_tiles(fast, strategy):
    if fast == "cpu" and not cases.INTERPRETED:
        pytest.skip("an error on the CPU, tested above")
    grad_output, input = (tensor.to(fast) for tensor in inputs(20, 3, 200))
    for bad in (200, -1, 2**31 - 1):
        cols = torch.tensor([[0, 199], [2, bad], [70, 130]], dtype=torch.int32, device=fast)
        found = gk.selected_weight_grad(grad_output, input, cols, strategy)
        assert found.isnan().tolist() == [[False, False], [False, True], [False, False]]


def test_offsets_out_of_range(fast):
    if fast != "cpu" or cases.INTERPRETED:
        pytest.skip("row offsets are trusted on a GPU: looking at them would synchronise it")
    grad_output, input = inputs(20, 3, 6)
    cols = torch.tensor([0, 1, 2], dtype=torch.int32)
    for offsets in ([0, 1, 2, 4], [1, 1, 2, 3], [0, 2, 1, 3], [0, -5, 2, 3]):
        with pytest.raises(IndexError, match=r"row_offsets.* 0 to 3"):
            gk.selected_weight_grad(grad_output, input, cols, row_offsets=torch.tensor(offsets))


def test_offsets_past_two_to_the_31(fast):
    """Tokens lie 2**31 elements apart; the memory between them is reserved, not used."""
    stride = 2**31 + 7
    storage = cases.reserved(stride + 64, fast)
    far = storage.as_strided((2, 40), (stride, 1))
    far.copy_(torch.randn(2, 40))
    near = far.clone()
    cols = cases.random_cols(40, 40, 2).to(fast)
    for strategy in STRATEGIES:
        expected = gk.selected_weight_grad(near, near, cols, strategy)
        assert cases.same_bits(gk.selected_weight_grad(far, far, cols, strategy), expected)
    assert cases.same_bits(gk.take_columns(far, cols[0]), gk.take_columns(near, cols[0]))


def test_products_of_strides_past_two_to_the_31(fast):
    """Strides that fit in 32 bits, of tokens and of features; the memory between them is reserved, not used."""
    stride = 2**30 + 4
    storage = cases.reserved(2 * stride + 64, fast)
    far = storage.as_strided((3, 40), (stride, 1))
    far.copy_(torch.randn(3, 40))
    near = far.clone()
    cols = {3: cases.random_cols(3, 3, 2).to(fast), 40: cases.random_cols(40, 40, 2).to(fast)}
    for left, right in ((far, near), (far.t(), near.t())):
        selected = cols[left.shape[1]]
        for strategy in STRATEGIES:
            expected = gk.selected_weight_grad(right, right, selected, strategy)
            torch.testing.assert_close(gk.selected_weight_grad(left, left, selected, strategy), expected)
        assert cases.same_bits(gk.take_columns(left, selected[0]), gk.take_columns(right, selected[0]))


GOOD = (torch.ones(4, 3), torch.ones(4, 5), torch.zeros(3, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.ones(3)}, ValueError, r"grad_output.*\[tokens, rows\].*\[batch, tokens, rows\]"),
        ({1: torch.ones(2, 2, 2, 5)}, ValueError, "input.*flatten"),
        ({1: torch.ones(4, 5).half()}, TypeError, "input.*float16.*grad_output.*float32"),
        ({0: torch.ones(4, 3).int()}, TypeError, "grad_output.*float32.*int32"),
        ({1: torch.ones(6, 5)}, ValueError, "tokens"),
        ({2: torch.zeros(3, 2)}, TypeError, "cols.*int32.*float32"),
        ({2: torch.zeros(4, 2, dtype=torch.int32)}, ValueError, "cols.* 4 .*grad_output.* 3 "),
        ({3: "dense"}, ValueError, "strategy.*'dense'.*auto, union, gather, tile"),
        ({0: torch.ones(4, 3).to_sparse()}, TypeError, "grad_output.*dense"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = [*GOOD, "auto"]
    for place, value in changes.items():
        arguments[place] = value
    for function in (gk.selected_weight_grad, gk.selected_weight_grad_bias):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_bad_offsets_and_columns():
    with pytest.raises(ValueError, match=r"row_offsets.*cols.*\[nnz\]"):
        gk.selected_weight_grad(*GOOD, row_offsets=torch.tensor([0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"row_offsets.*int64 \[4\]"):
        gk.selected_weight_grad(GOOD[0], GOOD[1], torch.zeros(2, dtype=torch.int32), row_offsets=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"columns.*int32 \[count\]"):
        gk.take_columns(torch.ones(3, 4), torch.tensor([1, 2]))


#: (batch, tokens, rows, n, k): many panels of columns, few rows for the threads to share, maps of 7 x 7 pixels
UNEVEN = [(None, 2000, 20, 700, 9), (None, 5000, 3, 40, 1), (30, 49, 70, 300, 2), (3, 300, 17, 40, 5)]


@pytest.mark.skipif(cases.INTERPRETED, reason="the native backend")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_every_simd_level(native, dtype, level):
    native._C.limit_simd(level)
    threads = torch.get_num_threads()
    try:
        for batch, tokens, rows, n, k in UNEVEN:
            grad_output, input = inputs(tokens, rows, n, dtype, batch)
            cols = cases.random_cols(rows, n, k)
            for left in (grad_output, token_contiguous(grad_output), spaced(grad_output)):
                for right in (input, token_contiguous(input)):
                    torch.set_num_threads(1)
                    expected = gk.selected_weight_grad(left, right, cols, "gather")
                    torch.set_num_threads(3)
                    assert cases.same_bits(gk.selected_weight_grad(left, right, cols, "gather"), expected)
                    check(left, right, cols, "cpu", "gather")
    finally:
        torch.set_num_threads(threads)


def popular(rows: int, n: int, k: int) -> Tensor:
    """Columns that some rows alone use, and columns that all of them do."""
    columns = torch.multinomial((torch.arange(n) + 1.0).pow(-1.5).expand(rows, n), k)
    return columns.sort(dim=1).values.to(torch.int32)


def test_union_of_groups():
    from gradsel_kernels import panels

    rows, n, k = 700, 400, 5
    grad_output, input = inputs(40, rows, n)
    cols = popular(rows, n, k)
    assert panels._plan(cols, None).rows is not None
    expected = reference.selected_weight_grad(grad_output.double(), input.double(), cols, None, "union")
    torch.testing.assert_close(panels.union(grad_output, input, cols, None).double(), expected, atol=1e-4, rtol=1e-4)

    kept = torch.rand(rows, k) < 0.7
    flat, row_offsets = cols[kept], offsets_of(kept.sum(1))
    assert panels._plan(flat, row_offsets).rows is not None
    found = panels.union(grad_output, input, flat, row_offsets)
    torch.testing.assert_close(found.double(), expected[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [30, 700])
def test_union_notices_changed_columns(rows):
    from gradsel_kernels import panels

    grad_output, input = inputs(40, rows, 400)
    cols = popular(rows, 400, 5)
    before = panels._plan(cols, None)
    assert panels._plan(cols, None) is before
    cols.add_(1).remainder_(400)
    expected = reference.selected_weight_grad(grad_output, input, cols, None, "union")
    torch.testing.assert_close(panels.union(grad_output, input, cols, None), expected, atol=1e-4, rtol=1e-4)

    flat = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    for offsets in ([0, 1, 2, 4], [0, 0, 4, 4]):
        row_offsets = torch.tensor(offsets)
        expected = reference.selected_weight_grad(grad_output[:, :3], input, flat, row_offsets, "union")
        found = panels.union(grad_output[:, :3], input, flat, row_offsets)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["union", "tile"])
def test_no_panel_is_as_large_as_the_weight(monkeypatch, strategy):
    from gradsel_kernels import panels

    sizes = []
    product = panels._product
    monkeypatch.setattr(panels, "_product", lambda *args: sizes.append(product(*args).numel()) or product(*args))
    getattr(panels, strategy)(*inputs(10, 600, 50), cases.random_cols(600, 50, 30), None)
    assert len(sizes) >= 4
    assert max(sizes) <= 600 * 50 / 4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
@pytest.mark.parametrize("batch", [None, 3])
def test_what_lies_behind_the_last_token_does_not_leak(fast, batch, dtype, strategy):
    """In a token-contiguous view that is the next row or column; here each second one is NaN."""
    grad_output, input = inputs(45, 34, 12, dtype, batch)
    grad_output[..., 1::2] = float("nan")
    input[..., 1::2] = float("inf")
    cols = (2 * cases.random_cols(34, 6, 2)).to(fast)
    for left in (grad_output, token_contiguous(grad_output)):
        for right in (input, token_contiguous(input)):
            found = gk.selected_weight_grad(left.to(fast), right.to(fast), cols, strategy)
            assert found[::2].isfinite().all()
            assert found[1::2].isnan().all()
