"""topk_masked_adam_ against the three operators that it fuses, one after the other, to the bit."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import Layout, reference
from tests.kernels import cases

#: A GPU's kernels take seconds for what takes the CPU's a tenth of one; the selection alone has tests of its own.
VALUES = (cases.ties, cases.special) if cases.FOR_GPUS else cases.VALUES
DTYPES = (torch.float32, torch.bfloat16) if cases.FOR_GPUS else cases.DTYPES
HALVES = (torch.bfloat16, torch.float16)
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "amsgrad": True},
    {"anchor": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 0.1, "anchor_l1": True, "anchor_decoupled": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"moment_dtype": torch.bfloat16, "amsgrad": True, "lr": 1.0},
]


def name(case):
    return getattr(case, "__name__", str(case)).removeprefix("torch.")


def separate(
    weights,
    grads,
    k,
    *,
    bits=True,
    originals=False,
    amsgrad=False,
    low_precision="nearest",
    seeds=None,
    moment_dtype=None,
    **options,
):
    """The same by topk_rows_bits and masked_adam_."""
    first = gk.FirstStep([], [], [], [], [], [], [], [], [])
    ks = [k] * len(weights) if isinstance(k, int) else k
    for weight, grad, count in zip(weights, grads, ks, strict=True):
        cols, packed = gk.topk_rows_bits(grad, count)
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        half = weight.dtype in HALVES
        moments = moment_dtype if moment_dtype and dtype is torch.float32 else dtype
        zeros = torch.zeros(cols.shape, dtype=moments, device=weight.device)
        first.cols.append(cols)
        first.bits.append(packed)
        first.exp_avgs.append(zeros.clone())
        first.exp_avg_sqs.append(zeros.clone())
        first.max_exp_avg_sqs.append(zeros.clone())
        first.originals.append(weight.gather(1, cols.long()).to(dtype))
        first.values.append(first.originals[-1].clone() if half and low_precision == "master" else None)
        first.compensations.append(zeros.to(weight.dtype) if half and low_precision == "kahan" else None)
        first.steps.append(torch.zeros((), device=weight.device))
    if not amsgrad:
        first.max_exp_avg_sqs.clear()
    if not originals and not options.get("anchor"):
        first.originals.clear()
    gk.masked_adam_(
        weights, grads, first.exp_avgs, first.exp_avg_sqs, first.steps,
        indices=first.cols, layouts=[Layout.COLS] * len(weights), values=first.values,
        max_exp_avg_sqs=first.max_exp_avg_sqs or None, originals=first.originals or None, seeds=seeds,
        compensations=first.compensations if any(c is not None for c in first.compensations) else None, **options,
    )  # fmt: skip
    if not bits:
        first.bits.clear()
    return first


def check(weights, grads, k, device, **options):
    weights, grads = [w.to(device) for w in weights], [g.to(device) for g in grads]
    before = [grad.clone() for grad in grads]
    expected_weights = [weight.clone() for weight in weights]
    options = {"lr": 0.1, **options}
    expected = separate(expected_weights, grads, k, **options)
    found = gk.topk_masked_adam_(weights, grads, k, **options)
    for field, mine, theirs in zip(found._fields, found, expected, strict=True):
        assert len(mine) == len(theirs), field
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None), field
            if a is not None:
                assert a.dtype == b.dtype, field
                assert a.shape == b.shape, field
                assert cases.same_bits(a, b), field
    for mine, theirs in zip(weights, expected_weights, strict=True):
        assert cases.same_bits(mine, theirs)
    for grad, same in zip(grads, before, strict=True):
        assert cases.same_bits(grad, same)
    for grad, cols in zip(grads, found.cols, strict=True):
        assert torch.equal(cols.cpu(), reference.topk_rows(grad.cpu(), max(cols.shape[1], 1)))
    return found


def weight_like(grad):
    return torch.randn(grad.shape, dtype=torch.float64).to(grad.dtype)


@pytest.mark.parametrize("values", VALUES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_all_shapes_in_one_call(fast, dtype, values):
    grads, ks = [], []
    for shape in cases.SHAPES:
        for k in cases.ks(shape[1]):
            grads.append(values(shape).to(dtype))
            ks.append(k)
    check([weight_like(grad) for grad in grads], grads, ks, fast)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_options(fast, dtype, options):
    grads = [cases.normal((9, 70)).to(dtype), cases.ties((3, 300)).to(dtype), cases.special((5, 40)).to(dtype)]
    check([weight_like(grad) for grad in grads], grads, [1, 20, 9], fast, **options)


@pytest.mark.parametrize("low_precision", ["nearest", "master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_low_precision(fast, dtype, low_precision):
    grads = [cases.normal((9, 70)).to(dtype), cases.normal((5, 300)), cases.special((5, 40)).to(dtype)]
    seeds = [7, None, -3] if low_precision == "stochastic" else None
    for options in ({}, {"anchor": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}):
        weights = [weight_like(grad) for grad in grads]
        check(weights, grads, [2, 9, 40], fast, low_precision=low_precision, seeds=seeds, lr=1e-3, **options)


@pytest.mark.parametrize("low_precision", ["nearest", "master", "kahan"])
def test_zeros_keep_the_sign_that_masked_adam_leaves(fast, low_precision):
    """Where the gradient is zero, nothing but the addition of a compensation changes -0.0."""
    grad, weight = torch.zeros(3, 40).bfloat16(), torch.full((3, 40), -0.0).bfloat16()
    check([weight, weight.float()], [grad, grad.float()], 3, fast, low_precision=low_precision, originals=True)


@pytest.mark.parametrize("view", cases.VIEWS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_strided_views(fast, dtype, view):
    for shape, k in (((70, 33), 1), ((17, 200), 5), ((9, 300), 40)):
        grad = cases.normal(shape).to(dtype)
        check([view(weight_like(grad))], [view(grad)], k, fast)
        check([weight_like(grad)], [view(grad)], k, fast)


def test_other_dtype_of_the_gradient(fast):
    for dtype in cases.DTYPES:
        for other in cases.DTYPES:
            if dtype is not other:
                check([torch.randn(6, 50).to(dtype)], [torch.randn(6, 50).to(other)], 3, fast)


@pytest.mark.parametrize("overflowed", [0.0, 1.0, 2.0])
def test_scaler(fast, overflowed):
    grads = [cases.normal((9, 70)).float() * 1024, cases.normal((3, 40)).half()]
    found = check(
        [weight_like(grad) for grad in grads], grads, 2, fast, amsgrad=True, anchor=0.1, low_precision="master",
        grad_scale=torch.tensor([1024.0], device=fast), found_inf=torch.tensor(overflowed, device=fast),
    )  # fmt: skip
    assert [float(step) for step in found.steps] == [float(not overflowed)] * 2


def test_long_rows(fast):
    for shape in cases.LONG_SHAPES:
        for k in (1, 5, 64):
            grad = cases.normal(shape).float()
            check([weight_like(grad)], [grad], k, fast, bits=k != 5, originals=k == 5)


def test_offsets_beyond_32_bits(fast):
    """Rows, and in a transposed view columns, lie 2**31 elements apart; the memory between them is not used."""
    stride = 2**31 + 7
    storage = cases.reserved(stride + 128, fast)
    grad, weight = storage.as_strided((2, 64), (stride, 1)), storage[64:].as_strided((2, 64), (stride, 1))
    for k, views in ((3, (weight, grad)), (1, (weight.t(), grad.t()))):
        grad.copy_(torch.randn(2, 64))
        weight.copy_(torch.randn(2, 64))
        near = [view.contiguous().clone() for view in views]
        first = gk.topk_masked_adam_([views[0]], [views[1]], k, lr=0.1)
        expected = gk.topk_masked_adam_(near[:1], near[1:], k, lr=0.1)
        assert torch.equal(first.cols[0], expected.cols[0])
        assert cases.same_bits(first.exp_avgs[0], expected.exp_avgs[0])
        assert cases.same_bits(views[0], near[0])


def test_many_small_tensors(fast):
    torch.manual_seed(4)
    shapes = [(1 + i % 5, 1 + 13 * i % 70) for i in range(12 if cases.FOR_GPUS else 200)]
    grads = [torch.randn(shape) for shape in shapes]
    check([weight_like(grad) for grad in grads], grads, 3, fast)
    assert gk.topk_masked_adam_([], [], 3, lr=0.1).cols == []


def test_does_not_depend_on_threads():
    if cases.FOR_GPUS:
        pytest.skip("threads are those of the CPU kernels")
    grads = [torch.randn(400, 300), torch.randn(300, 400).t()]
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            weights = [torch.ones(400, 300), torch.ones(400, 300)]
            first = gk.topk_masked_adam_(weights, grads, 7, lr=0.1)
        finally:
            torch.set_num_threads(before)
        results.append([*weights, *first.cols, *first.bits, *first.exp_avgs])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "tensor 0: k must be at least 1, got 0"),
        ({"k": [1, 2]}, ValueError, "k has 2 entries, but weights has 1"),
        ({"grads": [torch.zeros(3, 5)]}, ValueError, r"tensor 0: grad must have the shape of the weight \[3, 4\]"),
        ({"grads": [torch.zeros(3, 4).to_sparse()]}, TypeError, "tensor 0: grad must be a dense tensor"),
        ({"weights": [torch.zeros(12)]}, ValueError, "tensor 0: weight must be a 2-D neuron view"),
        ({"weights": [torch.zeros(1, 4).expand(3, 4)]}, ValueError, "written in place but is an expanded view"),
        ({"low_precision": "kahn"}, ValueError, "low_precision must be one of nearest, master, kahan, stochastic"),
        ({"low_precision": "stochastic"}, ValueError, "needs seeds, one for each of the 1 tensors, got none"),
        ({"moment_dtype": torch.float16}, TypeError, "moment_dtype must be None, torch.float32 or torch.bfloat16"),
        ({"found_inf": torch.zeros(2)}, ValueError, "found_inf must be one float32"),
    ],
)
def test_bad_input_changes_nothing(change, error, message):
    arguments = {"weights": [torch.zeros(3, 4)], "grads": [torch.ones(3, 4)], "k": 1, "lr": 0.1, **change}
    with pytest.raises(error, match=message):
        gk.topk_masked_adam_(**arguments)
    assert not arguments["weights"][0].any()


def test_weights_that_require_grad_need_no_grad():
    with pytest.raises(RuntimeError, match=r"under torch.no_grad"):
        gk.topk_masked_adam_([torch.zeros(3, 4, requires_grad=True)], [torch.ones(3, 4)], 1, lr=0.1)
