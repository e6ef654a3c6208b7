"""masked_adam_'s specification against torch.optim.Adam, with weight decay and every kind of anchor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.kernels import cases
from tests.kernels.adam_cases import FLOAT_DTYPES, OPTIONS, Problem, everything, flat_indices, masks


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_specification_is_bit_equal_to_torch_adam_on_the_gathered_entries(dtype, options, amsgrad):
    options = {"lr": 0.01, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, **options}
    with gk.use_backend("reference"):
        for layout, index, nnz_shape in masks(37, 101):
            weight = torch.randn(37, 101, dtype=dtype)
            picked = flat_indices(weight, index, layout)
            twin = torch.nn.Parameter(weight.view(-1)[picked].view(nnz_shape).clone())
            arguments = dict(options)
            betas = (arguments.pop("beta1"), arguments.pop("beta2"))
            torch_adam = torch.optim.Adam([twin], betas=betas, amsgrad=amsgrad, foreach=False, fused=False, **arguments)
            problem = Problem()
            problem.add(weight.clone(), index, layout, nnz_shape, compact=False, master=False)
            for _ in range(10):
                problem.new_gradients()
                twin.grad = problem.grads[0].view(-1)[picked].view(nnz_shape).clone()
                torch_adam.step()
                problem.step(amsgrad=amsgrad, **options)
                assert torch.equal(problem.weights[0].view(-1)[picked].view(nnz_shape), twin)
            state = torch_adam.state[twin]
            assert torch.equal(problem.exp_avgs[0], state["exp_avg"])
            assert torch.equal(problem.exp_avg_sqs[0], state["exp_avg_sq"])
            if amsgrad:
                assert torch.equal(problem.max_exp_avg_sqs[0], state["max_exp_avg_sq"])
            frozen = torch.ones(weight.numel(), dtype=torch.bool)
            frozen[picked] = False
            assert cases.same_bits(problem.weights[0].view(-1)[frozen], weight.view(-1)[frozen])


def pull_of(anchor: dict, p: Tensor, original: Tensor) -> Tensor:
    """The term that an anchor adds to the loss."""
    gap = p - original
    return anchor["anchor"] * (gap.abs() if anchor.get("anchor_l1") else gap**2).sum()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("anchor", "exact"),
    [({"anchor": 0.1, "anchor_l1": True}, True), ({"anchor": 2**-4}, True), ({"anchor": 0.1}, False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_coupled_anchor_is_a_term_of_the_loss(dtype, anchor, exact, maximize, amsgrad):
    """Bit-equal to torch's Adam on autograd's gradients, except for one rounding.

    Autograd rounds anchor * (2 * gap), then its sum with the gradient; the specification, like torch's weight decay,
    rounds once. Where the product is exact, for a sign or a power of two, there is nothing to round.
    """
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    with gk.use_backend("reference"):
        for layout, index, nnz_shape in masks(37, 101):
            problem = Problem()
            weight = torch.randn(37, 101, dtype=dtype)
            problem.add(weight.clone(), index, layout, nnz_shape, compact=False, master=False)
            picked = flat_indices(weight, index, layout)
            original = problem.originals[0].clone()
            twin = torch.nn.Parameter(weight.view(-1)[picked].view(nnz_shape).clone())
            adam = torch.optim.Adam([twin], lr=0.01, maximize=maximize, amsgrad=amsgrad, foreach=False, fused=False)
            for _ in range(10):
                problem.new_gradients()
                adam.zero_grad()
                loss = (problem.grads[0].view(-1)[picked].view(nnz_shape) * twin).sum()
                (loss + (-1 if maximize else 1) * pull_of(anchor, twin, original)).backward()
                adam.step()
                problem.step(amsgrad=amsgrad, maximize=maximize, **anchor)
                got = problem.weights[0].view(-1)[picked].view(nnz_shape)
                if exact:
                    assert torch.equal(got, twin)
                else:  # near zero, a gradient's rounding alone decides the step's direction
                    torch.testing.assert_close(got, twin.detach(), rtol=0, atol=tolerance)
            assert torch.equal(problem.originals[0], original)
            frozen = torch.ones(weight.numel(), dtype=torch.bool)
            frozen[picked] = False
            assert cases.same_bits(problem.weights[0].view(-1)[frozen], weight.view(-1)[frozen])


DECAYS = [{"weight_decay": 0.0}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": True}]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_comes_before_the_anchor(decay, l1, decoupled, maximize):
    """Each step written out as in the papers, in float64; Adam itself is torch's, without decay."""
    anchor, lr = 8.0, 0.01
    problem = Problem()
    problem.add(torch.randn(7, 9).double(), None, Layout.ALL, (7, 9), compact=False, master=False, earlier_steps=0)
    p, g, original = problem.weights[0].clone(), problem.grads[0].clone(), problem.originals[0].clone()
    g = -g if maximize else g
    if decay.get("decoupled_weight_decay"):
        p -= lr * decay["weight_decay"] * p
    else:
        g += decay["weight_decay"] * p
    gap = p - original
    if decoupled and l1:
        p = original + gap.sign() * (gap.abs() - lr * anchor).clamp(min=0)
        assert 0.1 < (p == original).double().mean() < 0.9
    elif decoupled:
        p -= 2 * lr * anchor * gap
    else:
        g += anchor * gap.sign() if l1 else 2 * anchor * gap
    twin = torch.nn.Parameter(p)
    twin.grad = g
    torch.optim.Adam([twin], lr=lr, foreach=False, fused=False).step()
    with gk.use_backend("reference"):
        problem.step(lr=lr, maximize=maximize, anchor=anchor, anchor_l1=l1, anchor_decoupled=decoupled, **decay)
    torch.testing.assert_close(problem.weights[0], twin.detach(), rtol=1e-13, atol=1e-14)


def step_without_gradient(device: str, p: list[float], original: list[float], **options) -> Tensor:
    """Parameters after a step of the anchor alone: Adam adds nothing."""
    weight = torch.tensor(p, device=device)
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    gk.masked_adam_(
        [weight], zeros[:1], zeros[1:2], zeros[2:], [torch.zeros((), device=device)],
        originals=[torch.tensor(original, device=device)], **options,
    )  # fmt: skip
    return weight.cpu()


def test_a_decoupled_l1_anchor_stops_at_the_original(fast):
    original = [-0.0, 0.0, 1.0, -3e-39, 0.3, 1e9, -7.0]
    for p in ([0.3] * 7, [-2e4] * 7, original):
        got = step_without_gradient(fast, p, original, lr=0.1, anchor=1e12, anchor_l1=True, anchor_decoupled=True)
        assert cases.same_bits(got, torch.tensor(original))


@pytest.mark.parametrize("l1", [False, True])
def test_a_decoupled_anchor_moves_nothing_without_a_learning_rate(fast, l1):
    """original + (p - original) would move p, rounding it to the last place of the original."""
    p = [1e-9, 1.1, -3.0]
    got = step_without_gradient(fast, p, [1.0, 1e7, 1e-9], lr=0.0, anchor=1.0, anchor_l1=l1, anchor_decoupled=True)
    assert torch.equal(got, torch.tensor(p))


def test_no_anchor_is_the_step_of_before(fast):
    problem = everything(torch.float32)
    for original in problem.originals:
        original.fill_(float("nan"))
    plain, there = problem.to(fast), problem.to(fast)
    plain.originals = None
    plain.step(weight_decay=0.1)
    there.step(weight_decay=0.1, anchor=0.0)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(getattr(plain, name), getattr(there, name), strict=True):
            assert cases.same_bits(a.cpu(), b.cpu())
