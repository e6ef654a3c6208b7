"""torch's checks of optimizers: parameter groups, and gradients that are missing, zero or empty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Parameter

from tests.gradsel.optim.torch_suite.cases import closure_of, each_class, each_input, problem, steps

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


# --- Parameter groups --------------------------------------------------------------------------------------------


@each_class
def test_param_groups_weight_decay(cls):
    (weight, bias), _loss = problem()
    before = weight.detach().clone(), bias.detach().clone()
    optimizer = cls([{"params": [weight]}, {"params": [bias], "weight_decay": 0.5}], lr=0.1, weight_decay=0.0)
    for p in (weight, bias):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert not torch.equal(bias, before[1])


@each_class
def test_param_groups_lr(cls):
    """A learning rate of zero in either group; the default is zero, too."""
    for rates in ((0.0, 0.01), (0.01, 0.0)):
        (weight, bias), loss = problem()
        before = [p.detach().clone() for p in (weight, bias)]
        optimizer = cls([{"params": [weight], "lr": rates[0]}, {"params": [bias], "lr": rates[1]}], lr=0.0)
        steps(optimizer, loss, 3)
        for p, old, rate in zip((weight, bias), before, rates, strict=True):
            assert torch.equal(p, old) == (rate == 0.0)


@each_class
def test_add_param_group_while_training(cls):
    (weight, bias), loss = problem()
    optimizer = cls([weight])
    steps(optimizer, loss, 2)
    bias_before = bias.detach().clone()
    optimizer.add_param_group({"params": bias, "lr": 0.1})
    steps(optimizer, loss, 2)
    assert not torch.equal(bias, bias_before)
    assert optimizer.state[weight]["step"] == 4
    assert optimizer.state[bias]["step"] == 2
    assert optimizer.param_groups[1]["eps"] == optimizer.defaults["eps"]


# --- Gradients ---------------------------------------------------------------------------------------------------


@each_class
@each_input
def test_step_is_noop_when_params_have_no_grad(cls, kwargs):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, **kwargs)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


@each_class
@each_input
def test_step_is_noop_for_zero_grads(cls, kwargs):
    """The step is counted; without weight decay, nothing moves."""
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, **{**kwargs, "weight_decay": 0.0})
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@each_class
def test_grad_none_keeps_the_state(cls):
    (weight, bias), loss = problem()
    optimizer = cls([weight, bias], weight_decay=0.1)
    steps(optimizer, loss, 2)
    before = bias.detach().clone(), copy.deepcopy(optimizer.state[bias])
    closure_of(optimizer, loss)()
    bias.grad = None
    optimizer.step()
    assert torch.equal(bias, before[0])
    assert str(optimizer.state[bias]) == str(before[1])
    assert (optimizer.state[weight]["step"], optimizer.state[bias]["step"]) == (3, 2)
    steps(optimizer, loss)
    assert (optimizer.state[weight]["step"], optimizer.state[bias]["step"]) == (4, 3)


@each_class
def test_empty_grad(cls):
    empty, zero_rows, other = Parameter(torch.empty(5, 0)), Parameter(torch.empty(0, 4, 2)), Parameter(torch.ones(3))
    for p in (empty, other, zero_rows):
        p.grad = torch.ones_like(p)
    optimizer = cls([empty, other, zero_rows])
    for _ in range(2):
        optimizer.step()
    assert other[0] != 1
    cls([empty]).step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


@each_class
@each_input
def test_grads_are_never_inplaced_into(cls, kwargs):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    loss().backward()
    for _ in range(2):
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for p, (grad, value, version) in zip(params, before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version


@each_class
def test_non_empty_state(cls):
    params, loss = problem()
    optimizer = cls(params)
    steps(optimizer, loss)
    for p in params:
        assert len(optimizer.state[p]) >= 3
    assert len(optimizer.state) == 2


@each_class
def test_closure_runs_with_gradients_once(cls):
    params, loss = problem()
    optimizer = cls(params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        return closure_of(optimizer, loss)()

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [1]
    assert value.requires_grad
    assert torch.is_grad_enabled()
