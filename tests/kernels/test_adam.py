"""masked_adam_'s backends against the specification, in every layout and dtype."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.kernels import cases
from tests.kernels.adam_cases import (
    ANCHORS,
    EARLIER_STEPS,
    FLOAT_DTYPES,
    OPTIONS,
    Problem,
    check_step,
    everything,
    exact_sqrt,
    flat_indices,
    masks,
    ulps,
)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS + ANCHORS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_step(fast, dtype, options, amsgrad):
    # A first step of 0.49999, just below a power of two, is where one ULP of torch's root weighs most: 3 ULP.
    limit = 3 if options.get("lr") == 0.5 else 2
    for earlier_steps in EARLIER_STEPS:
        check_step(everything(dtype, earlier_steps=earlier_steps), fast, cases.contiguous, amsgrad, options, limit)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS + ANCHORS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_step_is_bit_equal_but_for_the_root_of_torch(fast, dtype, options, amsgrad, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)
    for earlier_steps in EARLIER_STEPS:
        check_step(everything(dtype, earlier_steps=earlier_steps), fast, cases.contiguous, amsgrad, options, limit=0)


@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_strided_weights_and_gradients(fast, dtype, view):
    check_step(everything(dtype), fast, view, False, {"weight_decay": 0.1, "anchor": 0.05})


@pytest.mark.parametrize("grad_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradient_of_another_dtype(fast, dtype, grad_dtype):
    check_step(everything(dtype, grad_dtype), fast, cases.contiguous, False, {})


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (5, 0), (1, 33), (40, 1), (3, 2500)], ids=str)
def test_odd_shapes(fast, shape):
    options = {"weight_decay": 0.1, "anchor": 0.05}
    check_step(everything(torch.float32, shape=shape), fast, cases.contiguous, True, options)


def test_tensors_of_other_ranks(fast):
    """Convolutions are contiguous [out, ...]; biases are 1-D, scalars 0-D; neither needs a view."""
    problem = Problem()
    conv = torch.randn(6, 4, 3, 3)
    for layout, index, nnz_shape in masks(6, 36):
        shape = (6, 4, 3, 3) if layout == Layout.ALL else nnz_shape
        problem.add(conv.clone(), index, layout, shape, compact=False, master=False)
    problem.add(torch.randn(50), None, Layout.ALL, (50,), compact=False, master=True)
    problem.add(torch.randn(()), None, Layout.ALL, (), compact=False, master=False)
    problem.add(torch.randn(2, 3, 4).bfloat16(), None, Layout.ALL, (2, 3, 4), compact=False, master=True)
    check_step(problem, fast, cases.contiguous, True, {"weight_decay": 0.1, "anchor": 0.05})


def test_an_anchor_without_originals():
    p, m, v, step = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
    with pytest.raises(ValueError, match=r"anchor=0\.1.*originals"):
        gk.masked_adam_([p], [torch.ones(3)], [m], [v], [step], lr=0.1, anchor=0.1)
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert step == 0


def test_values_without_a_weight(fast):
    values = torch.randn(5, 3)
    problem = Problem()
    problem.add(values.clone(), None, Layout.ALL, (5, 3), compact=True, master=False)
    alone = problem.to(fast)
    alone.values, alone.weights = alone.weights, [None]
    alone.step(anchor=0.05)
    with gk.use_backend("reference"):
        problem.step(anchor=0.05)
    assert ulps(alone.values[0], problem.weights[0], problem.weights[0].abs().clamp(min=0.01)) <= 2


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4] + ANCHORS[::4], ids=str)
def test_a_hundred_steps_with_state_carried(fast, dtype, options):
    problem = Problem()
    for layout, index, nnz_shape in masks(13, 45):
        problem.add(torch.randn(13, 45, dtype=dtype), index, layout, nnz_shape, compact=False, master=False)
    there = problem.to(fast)
    largest = [weight.abs() for weight in problem.weights]
    for _ in range(20 if cases.INTERPRETED else 100):
        problem.new_gradients()
        for mine, theirs in zip(problem.grads, there.grads, strict=True):
            theirs.copy_(mine)
        there.step(**options)
        with gk.use_backend("reference"):
            problem.step(**options)
        largest = [torch.maximum(a, w.abs()) for a, w in zip(largest, problem.weights, strict=True)]
    for got, expected, scale in zip(there.weights, problem.weights, largest, strict=True):
        assert ulps(got, expected, scale) <= 4


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, *ANCHORS], ids=str)
def test_infinities_and_nans_stay_in_selected_entries(fast, options):
    problem = everything(torch.float32)
    for tensor in (*problem.grads, *problem.originals):
        tensor.copy_(cases.special(tuple(tensor.shape)))
    before = problem.to("cpu")
    there = problem.to(fast)
    there.step(amsgrad=True, **options)
    with gk.use_backend("reference"):
        problem.step(amsgrad=True, **options)
    for i, (got, expected) in enumerate(zip(there.weights, problem.weights, strict=True)):
        assert torch.allclose(got.cpu(), expected, equal_nan=True)
        frozen = torch.ones(expected.numel(), dtype=torch.bool)
        frozen[flat_indices(expected, problem.indices[i], problem.layouts[i])] = False
        assert cases.same_bits(got.cpu().view(-1)[frozen], before.weights[i].view(-1)[frozen])
        assert torch.equal(there.max_exp_avg_sqs[i].cpu().isnan(), problem.max_exp_avg_sqs[i].isnan())


def test_the_same_bits_on_every_run(fast):
    first, second = everything(torch.bfloat16, earlier_steps=3), None
    second = first.to(fast)
    first = first.to(fast)
    first.step(), second.step()
    for a, b in zip(first.weights, second.weights, strict=True):
        assert cases.same_bits(a.cpu(), b.cpu())


def test_versions_are_bumped(fast):
    problem = everything(torch.float32).to(fast)
    problem.weights[0].requires_grad_()
    saved = (problem.weights[0] ** 2).sum()
    with torch.no_grad():
        problem.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_step_counts_for_one_tensor(fast):
    """On a GPU, tensors are updated at the same time, so it would be undefined which of them counts first."""
    weights = [torch.ones(2, 3, device=fast) for _ in range(2)]
    moments = [[torch.zeros(2, 3, device=fast) for _ in weights] for _ in range(2)]
    with pytest.raises(ValueError, match="same step"):
        gk.masked_adam_(weights, weights, *moments, [torch.zeros((), device=fast)] * 2, lr=0.1)
    assert all((weight == 1).all() for weight in weights)


@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT], ids=str)
def test_an_index_out_of_range_changes_nothing(fast, layout):
    if fast != "cpu" or cases.FOR_GPUS:
        pytest.skip("CUDA kernels trust their indices and skip what is out of range (next test)")
    for backend in ("reference", "native"):
        problem = everything(torch.float32)
        bad = max(i for i, this in enumerate(problem.layouts) if this == layout)
        problem.indices[bad].view(-1)[-1] = -1
        before = problem.to("cpu")
        with gk.use_backend(backend), pytest.raises(IndexError, match=f"tensor {bad}.*indices"):
            problem.step()
        for name in ("weights", "values", "exp_avgs", "exp_avg_sqs", "steps"):
            for now, then in zip(getattr(problem, name), getattr(before, name), strict=True):
                assert now is None or torch.equal(now, then)


@pytest.mark.parametrize("bad", [-1, 40, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT], ids=str)
def test_an_index_out_of_range_is_skipped_on_cuda(fast, layout, bad):
    if fast == "cpu" and not cases.FOR_GPUS:
        pytest.skip("the CPU backends refuse it (previous test)")
    problem = Problem()
    index = cases.random_cols(6, 40, 3)
    if layout == Layout.FLAT:
        index = (torch.arange(6, dtype=torch.int32).unsqueeze(1) * 40 + index).view(-1)
        bad = 240 if bad == 40 else bad
    problem.add(torch.randn(6, 40), index, layout, tuple(index.shape), compact=False, master=False)
    there = problem.to(fast)
    there.indices[0].view(-1)[7] = bad
    there.step()
    with gk.use_backend("reference"):
        problem.step()
    changed = problem.weights[0].clone()
    at = 2, int(index.view(-1)[7]) % 40
    changed[at] = there.weights[0][at].cpu()
    assert torch.allclose(there.weights[0].cpu(), changed)
    assert there.exp_avgs[0].view(-1)[7] == 0  # neither its weight nor its state


def test_tensors_resized_between_steps_are_seen():
    """The native backend caches the last call, and must notice tensors that changed in place since."""
    weight, grad = torch.zeros(100), torch.ones(100)
    index = torch.arange(64, dtype=torch.int32)
    exp_avg, exp_avg_sq, step = torch.zeros(64), torch.zeros(64), torch.zeros(())
    arguments = {"indices": [index], "layouts": [Layout.FLAT], "lr": 0.1}
    gk.masked_adam_([weight], [grad], [exp_avg], [exp_avg_sq], [step], **arguments)
    for tensor in (index, exp_avg, exp_avg_sq):
        tensor.resize_(8)
    before = weight.clone()
    gk.masked_adam_([weight], [grad], [exp_avg], [exp_avg_sq], [step], **arguments)
    assert (weight != before).nonzero().view(-1).tolist() == list(range(8))
    gk.masked_adam_([weight], [torch.full((100,), -1.0)], [exp_avg], [exp_avg_sq], [step], **arguments)
    with pytest.raises(ValueError, match=r"grad.*dense"):
        gk.masked_adam_([weight], [torch.ones(99)], [exp_avg], [exp_avg_sq], [step], **arguments)


def test_other_originals_are_seen(fast):
    """The native backend caches the last call, and must notice other originals, or maxima in their place."""
    weight, *state = [torch.zeros(4, device=fast) for _ in range(5)]
    grad, exp_avg, exp_avg_sq, maxima = state
    step = torch.zeros((), device=fast)

    def step_to(**optional) -> float:
        gk.masked_adam_(
            [weight], [grad], [exp_avg], [exp_avg_sq], [step], lr=1.0,
            anchor=1e6 * ("originals" in optional), anchor_l1=True, anchor_decoupled=True, **optional,
        )  # fmt: skip
        return weight[0].item()

    assert step_to(max_exp_avg_sqs=[maxima]) == 0
    maxima.fill_(3.0)
    assert step_to(originals=[maxima]) == 3
    assert step_to(originals=[torch.full((4,), 5.0, device=fast)]) == 5
    assert step_to(originals=[maxima]) == 3
    maxima.set_(torch.full((4,), 7.0, device=fast))
    assert step_to(originals=[maxima]) == 7
    assert step_to(max_exp_avg_sqs=[maxima]) == 7
    with pytest.raises(ValueError, match=r"original.*exp_avg"):
        step_to(originals=[torch.zeros(3, device=fast)])


def test_a_negative_index_is_out_of_range_of_any_tensor():
    """Read as an unsigned number, -1 lies below the 4.9e9 entries of this overlapping view."""
    base = torch.zeros(150_000)
    weight = base.as_strided((70_000, 70_000), (1, 1), 10)
    state = [torch.zeros(1), torch.zeros(1), torch.zeros(())]
    index = torch.tensor([-1], dtype=torch.int32)
    for backend in ("reference", "native"):
        with gk.use_backend(backend), pytest.raises(IndexError, match="-1"):
            gk.masked_adam_(
                [weight], [torch.ones(1)], state[:1], state[1:2], state[2:],
                indices=[index], layouts=[Layout.FLAT], lr=0.1,
            )  # fmt: skip
    assert not base.any()


def test_tensors_that_require_grad_need_no_grad():
    weight = torch.ones(2, 3, requires_grad=True)
    state = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(())]
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        gk.masked_adam_([weight], [torch.ones(2, 3)], state[:1], state[1:2], state[2:], lr=0.1)
