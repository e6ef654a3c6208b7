"""Neuron views and the kinds of mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gradsel_kernels as gk
from gradsel.masks import (
    Flat,
    Frozen,
    PerRow,
    Whole,
    WholeColumns,
    WholeRows,
    difference,
    from_bits,
    from_coo,
    from_dense,
    from_parts,
    intersection,
    shared_entries,
    to_coo,
    union,
)
from gradsel.views import NeuronView, memory_offsets
from tests.kernels.cases import same_bits

LEADING = NeuronView()
VIEWS = [
    ((6, 10), LEADING),
    ((6, 4, 3, 3), LEADING),
    ((10, 6), NeuronView((1,))),  # transformers' Conv1D
    ((3, 4, 5), NeuronView((0, 1))),  # experts
    ((8, 4, 2, 2), NeuronView((1,))),  # ConvTranspose2d(8, 4, 2)
    ((8, 3, 2), NeuronView((0, 2), groups=4)),  # ConvTranspose1d(8, 12, 2, groups=4)
    ((4, 3, 5), NeuronView((0, 2))),  # experts, transposed
    ((7, 5, 3), LEADING),  # Conv1d
    ((1, 1), LEADING),
    ((1, 9), LEADING),
    ((5,), LEADING),
]


@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_a_view_and_its_inverse(shape, view):
    tensor = torch.randn(shape)
    matrix = view.of(tensor)
    assert tuple(matrix.shape) == view.shape(shape)
    assert torch.equal(view.undo(matrix, shape), tensor)
    alias = view.alias(tensor)
    if alias is not None:
        assert alias.data_ptr() == tensor.data_ptr()
        assert torch.equal(alias, matrix)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_a_transposed_convolution_are_its_output_channels(groups):
    """Zeroing one row of the view silences exactly that output channel."""
    conv = nn.ConvTranspose2d(8, 12, 3, groups=groups, bias=False)
    view = NeuronView((0, 2), groups) if groups > 1 else NeuronView((1,))
    matrix = view.of(conv.weight.detach()).clone()
    assert matrix.shape[0] == 12
    matrix[5] = 0
    conv.weight.data = view.undo(matrix, conv.weight.shape)
    out = conv(torch.randn(2, 8, 5, 5))
    silent = (out == 0).all(dim=(0, 2, 3))
    assert silent.nonzero().view(-1).tolist() == [5]


def test_memory_offsets_count_gaps_and_refuse_overlaps():
    assert memory_offsets(torch.zeros(2, 6)[:, ::2]).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert memory_offsets(torch.zeros(0, 6)).shape == (0, 6)
    with pytest.raises(ValueError, match="share memory"):
        memory_offsets(torch.zeros(4, 1).expand(4, 3))


def layouts(weight):
    """The same values in every memory layout that training scripts produce."""
    yield weight.clone()
    if weight.ndim == 2:
        yield weight.t().contiguous().t()
        yield torch.zeros(weight.shape[0], 2 * weight.shape[1]).to(weight.dtype)[:, ::2].copy_(weight)
    if weight.ndim == 4:
        yield weight.clone(memory_format=torch.channels_last)


def masks_for(shape, view):
    rows, cols = view.shape(shape)
    k = min(2, cols)
    picked = torch.rand(rows, cols).topk(k, 1).indices.sort(1).values.to(torch.int32)
    yield PerRow(picked, shape, view)
    yield WholeRows(torch.randperm(rows)[:2].sort().values.to(torch.int32), shape, view)
    yield WholeRows(torch.arange(rows, dtype=torch.int32), shape, view)
    yield WholeColumns(torch.randperm(cols)[:2].sort().values.to(torch.int32), shape, view)
    yield Flat.from_dense(torch.rand(shape) < 0.3)
    yield Flat(torch.empty(0, dtype=torch.int64), shape)
    yield Whole(shape)
    yield Frozen(shape, "a test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_gather_and_scatter_agree_with_the_dense_mask(shape, view, dtype):
    for mask in masks_for(shape, view):
        dense = mask.to_dense()
        assert dense.shape == shape
        assert int(dense.sum()) == mask.nnz
        for weight in layouts(torch.randn(shape).to(dtype)):
            before = weight.clone()
            values = mask.gather(weight)
            assert tuple(values.shape) == mask.compact_shape
            assert sorted(values.reshape(-1).tolist()) == sorted(weight[dense].tolist())
            mask.scatter_(weight, values + 1)
            assert same_bits(mask.gather(weight), values + 1)
            assert same_bits(weight[~dense], before[~dense])


@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_places_lead_the_kernel_to_the_selected_entries(shape, view):
    """A step of gradient ascent through the kernel moves the entries of the dense mask, each by its own gradient."""
    for mask in masks_for(shape, view):
        if mask.nnz == 0:
            continue
        for weight in layouts(torch.randn(shape)):
            for grad in layouts(torch.randn(shape)):
                before = weight.clone()
                where = mask.place(weight)
                exp_avg, exp_avg_sq = torch.zeros(mask.compact_shape), torch.zeros(mask.compact_shape)
                gk.masked_adam_(
                    [where.weight], [mask.grad_at(where, weight, grad)], [exp_avg], [exp_avg_sq], [torch.zeros(())],
                    indices=[where.indices], layouts=[where.layout], lr=0.1, beta1=0.0,
                )  # fmt: skip
                assert torch.equal((weight != before).view(shape), mask.to_dense())
                assert torch.equal(exp_avg, mask.gather(grad))


@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_places_lead_the_kernel_from_values_to_their_weight(shape, view):
    """The same with compact gradients and values in mask order, as in an attached model."""
    for mask in masks_for(shape, view):
        if mask.nnz == 0:
            continue
        for weight in layouts(torch.randn(shape)):
            before = weight.clone()
            values, grad = mask.gather(weight), torch.randn(mask.compact_shape)
            where = mask.place(weight)
            gk.masked_adam_(
                [where.weight], [grad], [torch.zeros_like(grad)], [torch.zeros_like(grad)], [torch.zeros(())],
                values=[values], indices=[where.indices], layouts=[where.layout], lr=0.1, beta1=0.0,
            )  # fmt: skip
            assert torch.equal((weight != before).view(shape), mask.to_dense())
            assert torch.equal(mask.gather(weight), values)
            assert torch.equal((mask.gather(weight) - mask.gather(before)).sign(), -grad.sign())


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["whole input", "used columns"])
@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_the_product_with_selected_entries_is_that_of_the_masked_weight(shape, view, share):
    rows, cols = view.shape(shape)
    for mask in masks_for(shape, view):
        if isinstance(mask, Frozen):
            continue  # has no product
        weight = torch.where(mask.to_dense(), torch.randn(shape), 0.0)
        output, input = torch.randn(3, rows), torch.randn(3, cols)
        expected = output + input @ view.of(weight).T
        mask.product(view, share=share).add_to(output, input, mask.gather(weight))
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_parts_round_trip(shape, view):
    for mask in masks_for(shape, view):
        for parts in (mask.tensors(), mask.packed()):
            again = from_parts(mask.kind, list(shape), mask.describe(), parts)
            assert type(again) is type(mask)
            assert torch.equal(again.to_dense(), mask.to_dense())
            assert repr(again) == repr(mask)
            assert {part: tensor.dtype for part, tensor in again.tensors().items()} == {
                part: tensor.dtype for part, tensor in mask.tensors().items()
            }
            assert all(
                torch.equal(*pair) for pair in zip(again.tensors().values(), mask.tensors().values(), strict=True)
            )


def random_cols(rows, n, k):
    return torch.rand(rows, n).topk(k, 1).indices.sort(1).values.to(torch.int32)


@pytest.mark.parametrize(
    ("mask", "part", "dtype", "size"),
    [
        (PerRow(random_cols(8, 65536, 3), (8, 65536)), "cols", torch.uint16, 8 * 3 * 2),
        (PerRow(random_cols(8, 65537, 3), (8, 65537)), "cols", torch.int32, 8 * 3 * 4),
        (PerRow(random_cols(8, 320, 20), (8, 320)), "cols", torch.uint16, 8 * 20 * 2),
        (PerRow(random_cols(8, 320, 21), (8, 320)), "bits", torch.int32, 8 * 10 * 4),
        (PerRow(random_cols(8, 320, 21), (320, 8), NeuronView((1,))), "bits", torch.int32, 8 * 10 * 4),
        (WholeRows(torch.tensor([3, 69999], dtype=torch.int32), (70000, 2)), "rows", torch.int32, 8),
        (WholeColumns(torch.tensor([3, 9], dtype=torch.int32), (70000, 10)), "cols", torch.uint16, 4),
        (Flat(torch.tensor([3, 69999]), (70000, 1)), "indices", torch.int32, 8),
        (Flat(torch.arange(0, 70000, 2), (70000, 1)), "bits", torch.int32, 4 * 2188),
        (Flat(torch.tensor([3, 2**40]), (2**21, 2**21)), "indices", torch.int64, 16),
    ],
)
def test_the_smallest_encoding_is_chosen(mask, part, dtype, size):
    (found,) = mask.packed().items()
    assert (found[0], found[1].dtype, found[1].nbytes) == (part, dtype, size)
    again = from_parts(mask.kind, mask.shape, mask.describe(), mask.packed())
    assert torch.equal(again.entries(), mask.entries())


@pytest.mark.parametrize(("shape", "view"), [*VIEWS, ((), None), ((0, 4), LEADING), ((3, 0), LEADING)], ids=str)
def test_other_forms_round_trip(shape, view):
    """Entries, bits and coordinates agree with the dense mask, and each converts back to it."""
    masks = list(masks_for(shape, view)) if view and 0 not in shape else [Whole(shape), Frozen(shape)]
    for mask in masks:
        dense = mask.to_dense()
        assert mask.entries().dtype is torch.int64
        assert torch.equal(mask.entries(), dense.reshape(-1).nonzero().view(-1))
        assert torch.equal(
            torch.sparse_coo_tensor(to_coo(mask), torch.ones(mask.nnz), shape, check_invariants=True).to_dense(),
            dense.float(),
        )
        matrix = dense.reshape(shape[0] if shape else 1, -1) if dense.numel() else dense
        assert torch.equal(gk.unpack_bits(mask.to_bits(), matrix.shape[1]), matrix)
        for again in (from_dense(dense), from_bits(mask.to_bits(), shape), from_coo(to_coo(mask).flip(1), shape)):
            assert torch.equal(again.to_dense(), dense)
            assert again.kind == "frozen" if not mask.nnz else again.kind == "whole" if mask.nnz == mask.numel else True


@pytest.mark.parametrize(
    ("shape", "view"), [case for case in VIEWS if case[1].groups == 1 and len(case[0]) > 1 < case[0][1]]
)
def test_imports_find_the_regular_kind(shape, view):
    rows, n = view.shape(shape)
    torch.manual_seed(0)
    for mask in [
        PerRow(random_cols(rows, n, 2), shape, view) if n > 2 else None,
        WholeRows(torch.tensor([0, rows - 1], dtype=torch.int32), shape, view) if rows > 2 else None,
        WholeColumns(torch.tensor([1, n - 1], dtype=torch.int32), shape, view) if n > 2 and rows > 1 else None,
    ]:
        if mask is None:
            continue
        found = from_dense(mask.to_dense())
        if view.is_leading or mask.kind == "per-row":
            assert (found.kind, found.view) == (mask.kind, view)
        else:  # may be recognised from the other side: columns of the first dimension are rows of the others
            assert found.kind in ("rows", "columns")
            assert torch.equal(found.to_dense(), mask.to_dense())
    irregular = torch.zeros(shape, dtype=torch.bool)
    irregular.view(-1)[[0, 1, -1]] = True
    assert from_dense(irregular).kind == ("irregular" if rows > 1 else "per-row")


SETS = [
    (union, torch.logical_or),
    (intersection, torch.logical_and),
    (difference, lambda a, b: a & ~b),
]


@pytest.mark.parametrize(("operation", "dense"), SETS, ids=["union", "intersection", "difference"])
@pytest.mark.parametrize(("shape", "view"), VIEWS, ids=str)
def test_set_operations_agree_with_the_dense_masks(shape, view, operation, dense):
    """Every pair of kinds, in one view and in two."""
    others = [mask for other in {view, LEADING} for mask in masks_for(shape, other)]
    for a, b in itertools.product([*masks_for(shape, view)], others):
        for first, second in ((a, b), (b, a)):
            result = operation(first, second)
            expected = dense(first.to_dense(), second.to_dense())
            assert result.shape == shape
            assert torch.equal(result.to_dense(), expected), (first, second)
            assert shared_entries(first, second) == int((first.to_dense() & second.to_dense()).sum())
            assert_as_regular_as_it_can_be(result, first, second)


def assert_as_regular_as_it_can_be(result, a, b):
    if result.nnz in (0, result.numel):
        assert result.kind == ("whole" if result.nnz else "frozen")
    elif a.kind == b.kind and a.kind in ("rows", "columns") and a.view == b.view:
        assert result.kind == a.kind
        assert result.view == a.view
    elif a.nnz in (0, a.numel) or b.nnz in (0, b.numel):
        return  # one of the two, or all but one
    else:
        views = {mask.view for mask in (a, b) if hasattr(mask, "view")}
        views = views or ({LEADING} if len(result.shape) > 1 else set())
        counts = {view: view.of(result.to_dense()).sum(1) for view in views}
        equal = len(views) == 1 and all(bool((count == count[0]).all()) for count in counts.values())
        assert result.kind == ("per-row" if equal else "irregular")
        assert not equal or result.view in views


def test_set_operations_keep_what_does_not_change():
    some, nothing = PerRow(int32([0], [1]), (2, 3)), Frozen((2, 3), "normalisation")
    assert union(nothing, some) is some
    assert union(some, nothing) is some
    assert difference(some, nothing) is some
    for result in (intersection(some, nothing), intersection(nothing, some), difference(nothing, some)):
        assert result is nothing
    assert union(nothing, Frozen((2, 3), "embedding")).label == "normalisation"
    assert difference(some, Whole((2, 3))).label == "nothing selected"
    assert union(some, difference(Whole((2, 3)), some)).is_whole
    assert union(PerRow(int32([0, 1, 2], [0, 1, 2]), (2, 3)), nothing).is_whole


def test_used_columns():
    per_row = PerRow(torch.tensor([[0, 5], [5, 39], [2, 5]], dtype=torch.int32), (3, 40))
    assert per_row.used_columns().tolist() == [0, 2, 5, 39]
    assert Flat(torch.tensor([1, 7, 13]), (3, 6)).used_columns().tolist() == [1]
    assert WholeRows(int32([1])[0], (3, 4)).used_columns().tolist() == [0, 1, 2, 3]
    assert WholeColumns(int32([1, 3])[0], (3, 4)).used_columns().tolist() == [1, 3]
    assert Whole((4, 3, 2)).used_columns().tolist() == [0, 1, 2, 3, 4, 5]
    assert Frozen((4, 3), "a test").used_columns().numel() == 0


def test_to_bits():
    mask = PerRow(torch.tensor([[0, 33], [5, 39]], dtype=torch.int32), (2, 40))
    assert mask.to_bits().tolist() == [[1 << 0, 1 << 1], [1 << 5, 1 << 7]]


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PerRow(int32([0], [1]).long(), (2, 3)), TypeError, "cols .*int32"),
        (lambda: PerRow(int32([0]), (2, 3)), ValueError, r"cols .*\[2, at most 3\]"),
        (lambda: PerRow(int32([0], [3]), (2, 3)), ValueError, "0 to 2.*0 to 3"),
        (lambda: PerRow(int32([-1], [1]), (2, 3)), ValueError, "cols .*-1 to 1"),
        (lambda: PerRow(int32([0, 1], [2, 2]), (2, 3)), ValueError, "row 1"),
        (lambda: WholeRows(torch.tensor([1]), (2, 3)), TypeError, r"rows .*int32 \[k\]"),
        (lambda: WholeRows(int32([2])[0], (2, 3)), ValueError, "rows .*ascend .*0 to 1"),
        (lambda: WholeColumns(int32([2, 1])[0], (2, 3)), ValueError, "cols .*ascend .*0 to 2"),
        (lambda: Flat(torch.tensor([1, 1]), (2, 3)), ValueError, "ascend"),
        (lambda: Flat(torch.tensor([1, 6]), (2, 3)), ValueError, "0 to 5"),
        (lambda: Flat(torch.tensor([1.0]), (2, 3)), TypeError, "int32 or int64"),
        (lambda: Flat.from_dense(torch.ones(2, 3)), TypeError, "bool"),
        (lambda: Flat(int32([5, -(2**31)])[0], (2, 3)), ValueError, "ascend"),  # their difference overflows
        (lambda: WholeRows(int32([1, -(2**31)])[0], (2, 3)), ValueError, "ascend"),
        (lambda: from_dense(torch.ones(2, 3)), TypeError, "bool"),
        (lambda: from_bits(torch.ones(2, 1), (2, 3)), TypeError, r"bits .*torch\.int32"),
        (lambda: from_bits(int32([1, 1]), (2, 3)), ValueError, r"\[2, 1\].*\[1, 2\]"),
        (lambda: from_coo(torch.ones(2, 1), (2, 3)), TypeError, "indices .*int64"),
        (lambda: from_coo(int32([1, 1]), (2, 3)), ValueError, r"\[2, nnz\].*\[1, 2\]"),
        (lambda: from_coo(int32([1], [3]), (2, 3)), ValueError, "dimension 1 .*0 to 2.*3 to 3"),
        (lambda: from_coo(int32([-1], [1]), (2, 3)), ValueError, "dimension 0 .*0 to 1.*-1"),
        (lambda: from_parts("diagonal", (2, 3), {}, {}), ValueError, "kind .*'diagonal'"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_masks_label_goes_by_two_names():
    for mask in (Whole((2, 3)), Frozen((2, 3), "embedding")):
        assert mask.how == mask.label
