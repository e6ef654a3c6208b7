"""The CUDA backends: the same bits in every run, those of the C++ kernels on the CPU, and none where none is due."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout, reference
from tests.gpu import OPERATORS, SIZE, columns, copy_gradients, differing, one_of_each, wait
from tests.kernels import cases
from tests.kernels.adam_cases import Problem, flat_indices

RUNS = 20
FEW = (Layout.COLS, Layout.FLAT)


def name(case) -> str:
    return getattr(case, "__name__", str(case)).removeprefix("torch.")


# --- The same bits in every run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_run_has_the_same_bits(kernels, device, operator, dtype):
    cols = columns(device)
    for values in (cases.normal, cases.ties):
        x = values((SIZE, SIZE)).to(dtype).to(device)
        first = OPERATORS[operator](x, cols)
        for _ in range(RUNS - 1):
            for a, b in zip(first, OPERATORS[operator](x, cols), strict=True):
                assert cases.same_bits(a, b)


def test_every_run_of_long_rows_has_the_same_bits(kernels, device):
    x = cases.ties((5, 70001)).float().to(device)
    for k in (5, 64):
        first = gk.topk_rows_bits(x, k)
        for _ in range(RUNS - 1):
            for a, b in zip(first, gk.topk_rows_bits(x, k), strict=True):
                assert torch.equal(a, b)


def scaling(device: str, found: float = 0.0) -> dict[str, Tensor]:
    return {"grad_scale": torch.tensor(8.0, device=device), "found_inf": torch.tensor(found, device=device)}


def test_every_run_of_a_step_has_the_same_bits(kernels, device):
    problem = one_of_each(torch.float32)
    options = {"weight_decay": 0.1, **scaling(device)}
    first = problem.to(device)
    first.step(**options)
    for _ in range(RUNS - 1):
        again = problem.to(device)
        again.step(**options)
        assert differing(first, again) == []


# --- The bits of the C++ kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [cases.normal, cases.ties, cases.special], ids=name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_top_k_is_that_of_the_cpu(kernels, device, dtype, values):
    grad = values((300, 768)).to(dtype)
    for k in (1, 5, 64):
        found = gk.topk_rows_bits(grad.to(device), k)
        with gk.use_backend("native"):
            expected = gk.topk_rows_bits(grad, k)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("how", ["nearest", "master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_a_first_step_is_that_of_the_cpu(kernels, device, dtype, how):
    """In one call: gradients of every size of K and of row, with everything that the operator can make."""
    grads = [values(shape).to(dtype) for shape in ((40, 768), (9, 5000)) for values in (cases.normal, cases.ties)]
    weights = [torch.randn(grad.shape, dtype=torch.float64).to(dtype) for grad in grads]
    options = {"weight_decay": 0.1, "amsgrad": True, "anchor": 0.1, "low_precision": how, "seeds": range(4)}
    if dtype in (torch.float32, torch.float64):
        options |= {"seeds": [None] * 4}
    there = [weight.clone().to(device) for weight in weights]
    found = gk.topk_masked_adam_(there, [grad.to(device) for grad in grads], [1, 5, 64, 70], lr=0.01, **options)
    with gk.use_backend("native"):
        expected = gk.topk_masked_adam_(weights, grads, [1, 5, 64, 70], lr=0.01, **options)
    for field, mine, theirs in zip(found._fields, found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None and b is None) or cases.same_bits(a.cpu(), b), field
    for mine, theirs in zip(there, weights, strict=True):
        assert cases.same_bits(mine.cpu(), theirs)


def check_steps(problem: Problem, device: str, steps: int = 3, scaler: dict[str, float] | None = None, **options):
    """A few steps with new gradients, after each of which every bit is that of the native backend on the CPU."""
    there = problem.to(device)
    for _ in range(steps):
        problem.new_gradients()
        copy_gradients(problem, there)
        there.step(**options, **{key: torch.tensor(x, device=device) for key, x in (scaler or {}).items()})
        with gk.use_backend("native"):
            problem.step(**options, **{key: torch.tensor(x) for key, x in (scaler or {}).items()})
        assert differing(there, problem) == []


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    "anchor": {"anchor": 0.05, "weight_decay": 0.1},
    "L1 anchor": {"anchor": 0.05, "anchor_l1": True},
    "decoupled anchor": {"anchor": 10.0, "anchor_decoupled": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "decoupled L1 anchor": {"anchor": 5.0, "anchor_decoupled": True, "anchor_l1": True},
    "scaler": {"scaler": {"grad_scale": 3.7, "found_inf": 0.0}},
    "overflow": {"scaler": {"grad_scale": 3.7, "found_inf": 1.0}},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_in_float32_has_the_bits_of_the_cpu(kernels, device, case):
    check_steps(one_of_each(torch.float32, FEW), device, **OPTIONS[case])


def test_a_step_of_every_layout_has_the_bits_of_the_cpu(kernels, device):
    check_steps(one_of_each(torch.float32), device, weight_decay=0.1)


@pytest.mark.parametrize("case", ["amsgrad", "decoupled L1 anchor"])
def test_a_step_in_float64_has_the_bits_of_the_cpu(kernels, device, case):
    check_steps(one_of_each(torch.float64, FEW), device, **OPTIONS[case])


@pytest.mark.parametrize("how", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_a_step_in_16_bits_has_the_bits_of_the_cpu(kernels, device, dtype, how):
    check_steps(one_of_each(dtype, FEW).round(how), device, amsgrad=True, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_moments_in_bfloat16_have_the_bits_of_the_cpu(kernels, device, dtype):
    problem = one_of_each(dtype, FEW).halve_moments().round("stochastic")
    check_steps(problem, device, beta2=0.99, scaler={"grad_scale": 3.7, "found_inf": 0.0})


def test_a_step_of_many_tensors_has_the_bits_of_the_cpu(kernels, device):
    """More than one launch may carry: their addresses travel in parts, or in a table."""
    problem = Problem()
    for i in range(500):
        shape = (1 + i % 7, 20 + i)
        cols = cases.random_cols(*shape, 2)
        problem.add(torch.randn(shape), cols, Layout.COLS, tuple(cols.shape), compact=i % 2 == 0, master=False)
    check_steps(problem, device)


def test_counts_of_steps_far_along(kernels, device):
    """Bias corrections are powers of the step count: all of them as on the CPU, to the bit."""
    problem = Problem()
    for step in (1, 2, 3, 10, 1000, 12345, 10**6, 2**24 - 2):
        problem.add(torch.randn(4, 20), None, Layout.ALL, (4, 20), compact=False, master=False, earlier_steps=step)
    check_steps(problem, device, steps=1)


# --- What is not selected ----------------------------------------------------------------------------------------


def random_bits(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers of any kind, NaN of any payload among them."""
    half, rest = 2 ** (8 * dtype.itemsize - 1), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.randint(-half, half - 1, (count,)).to(rest).view(dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name)
def test_frozen_weights_keep_their_bits(kernels, device, dtype):
    problem = one_of_each(dtype)
    frozen = []
    for weight, index, layout in zip(problem.weights, problem.indices, problem.layouts, strict=True):
        apart = torch.ones(weight.numel(), dtype=torch.bool)
        apart[flat_indices(weight, index, layout)] = False
        weight.view(-1)[apart] = random_bits(int(apart.sum()), dtype)
        frozen.append(apart)
    there = problem.to(device)
    for step in range(RUNS):
        problem.new_gradients()
        for grad, weight, apart in zip(problem.grads, problem.weights, frozen, strict=True):
            if grad.shape == weight.shape:
                grad.view(-1)[apart] = float("nan")
        copy_gradients(problem, there)
        there.step(lr=0.1, weight_decay=0.1, **scaling(device, found=float(step == 5)))
    for found, weight, apart in zip(there.weights, problem.weights, frozen, strict=True):
        after, before = found.cpu().view(-1), weight.view(-1)
        assert cases.same_bits(after[apart], before[apart])
        assert after[~apart].isfinite().all()
        assert (after[~apart] != before[~apart]).float().mean() > 0.5
    assert all(float(step) == 3 + RUNS - 1 for step in there.steps)


# --- Several devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_on_a_device_that_is_not_the_current_one(kernels, device, operator):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is only one CUDA device")
    there = "cuda:1" if device == "cuda" else "cpu"
    x, cols = cases.normal((SIZE, SIZE)).float(), columns("cpu")
    found = OPERATORS[operator](x.to(there), cols.to(there))
    wait(device)
    with gk.use_backend("native"):
        expected = OPERATORS[operator](x, cols)
    for a, b in zip(found, expected, strict=True):
        assert str(a.device) == there
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)


def test_the_specification_agrees_on_cuda_tensors(kernels, device):
    """Plain torch on the device, the backend that takes over where another is off."""
    grad = cases.ties((300, 768)).to(device)
    expected = gk.topk_rows_bits(grad, 5)
    for a, b in zip(reference.topk_rows_bits(grad, 5), expected, strict=True):
        assert torch.equal(a, b)
    mask = cases.random_mask(40, 100).to(device)
    assert torch.equal(reference.pack_bits(mask), gk.pack_bits(mask))
    assert torch.equal(gk.unpack_bits(gk.pack_bits(mask), 100), mask)
