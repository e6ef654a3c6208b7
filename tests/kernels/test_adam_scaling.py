"""masked_adam_ with scaled gradients: divided first, and skipped where infinities were found."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import gradsel_kernels as gk
from tests.kernels import cases
from tests.kernels.adam_cases import (
    FLOAT_DTYPES,
    HALVES,
    ROUNDINGS,
    SOME_OPTIONS,
    adam_arguments,
    check_same_bits,
    everything,
    same_tensors,
)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2] if cases.INTERPRETED else cases.DTYPES, ids=str)
def test_a_scaled_gradient_is_divided_first(fast, dtype, options):
    """A power of two leaves nothing to round, so the bits are those of the unscaled gradient."""
    plain = everything(dtype, earlier_steps=3)
    scaled = plain.to("cpu")
    for grad in scaled.grads:
        grad *= 8
    plain, scaled = plain.to(fast), scaled.to(fast)
    plain.step(amsgrad=True, **options)
    scaled.step(amsgrad=True, grad_scale=torch.tensor([8.0], device=fast), **options)
    assert same_tensors(plain, scaled)
    assert torch.equal(scaled.grads[0].cpu(), 8 * plain.grads[0].cpu())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_division_is_rounded_once_in_the_dtype_of_the_state(fast, dtype):
    plain = everything(dtype, earlier_steps=3)
    scaled = plain.to(fast)
    scale = torch.tensor(3.7)
    for grad in plain.grads:
        grad.copy_(torch.from_numpy(grad.numpy() / scale.to(dtype).numpy()))
    plain = plain.to(fast)
    plain.step(weight_decay=0.1, anchor=0.1)
    scaled.step(weight_decay=0.1, anchor=0.1, grad_scale=scale.to(fast), found_inf=torch.zeros(1, device=fast))
    assert same_tensors(plain, scaled)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_narrow_gradient_is_divided_in_float32(fast, dtype, exact_root):
    problem = everything(dtype, earlier_steps=3).round("stochastic")
    check_same_bits(problem, fast, grad_scale=torch.tensor(3.7, device=fast))


def test_scaling_is_that_of_torchs_fused_adam(fast):
    """torch divides in float32, too, but fuses other products, hence the tolerance."""
    p, g = torch.randn(100), 1000 * torch.randn(100)
    twin = torch.nn.Parameter(p.clone())
    adam = torch.optim.Adam([twin], lr=0.01, eps=0.1, fused=True)  # with a small eps, no scale would matter
    zeros = [torch.zeros(100, device=fast) for _ in range(2)]
    weight, step = p.to(fast), torch.zeros((), device=fast)
    for found in (0.0, 1.0, 0.0):
        twin.grad, adam.grad_scale, adam.found_inf = g.clone(), torch.tensor(1000.0), torch.tensor(found)
        adam.step()
        scaler = {"grad_scale": adam.grad_scale.to(fast), "found_inf": adam.found_inf.to(fast)}
        gk.masked_adam_([weight], [g.to(fast)], zeros[:1], zeros[1:], [step], lr=0.01, eps=0.1, **scaler)
        torch.testing.assert_close(weight.cpu(), twin.detach(), rtol=1e-6, atol=1e-7)
    assert float(step) == float(adam.state[twin]["step"]) == 2


@pytest.mark.parametrize("found", [2.0, float("nan")] + [1.0, -0.5, float("inf")] * (not cases.INTERPRETED))
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_nothing_changes_where_infinities_were_found(fast, found, backend):
    device = fast if backend == "fast" else "cpu"
    for how in ROUNDINGS:
        problem = everything(torch.bfloat16, earlier_steps=3).round(how).to(device)
        before = problem.to("cpu")
        with gk.use_backend("reference") if backend == "reference" else nullcontext():
            problem.step(amsgrad=True, weight_decay=0.1, anchor=0.1, found_inf=torch.tensor(found, device=device))
        assert same_tensors(problem, before)


def test_a_step_is_done_where_no_infinity_was_found(fast):
    plain = everything(torch.float16, earlier_steps=3).round("compensated").to(fast)
    checked = plain.to(fast)
    plain.step()
    for zero in (0.0, -0.0):
        there = checked.to(fast)
        there.step(found_inf=torch.tensor([zero], device=fast))
        assert same_tensors(plain, there)


def test_a_scaler_of_another_shape_is_refused_in_every_call():
    """The native backend caches that the tensors were checked; the scaler's are checked in every call."""
    arguments = adam_arguments()
    gk.masked_adam_(**arguments, found_inf=torch.zeros(1))
    for name in ("found_inf", "grad_scale"):
        with pytest.raises(ValueError, match=f"{name}.*float32"):
            gk.masked_adam_(**arguments, **{name: torch.zeros(2)})
    assert arguments["steps"][0] == 1
