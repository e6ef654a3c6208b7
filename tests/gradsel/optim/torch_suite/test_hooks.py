"""torch's checks of optimizers: hooks and GradScaler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradsel
from tests.gradsel.optim.torch_suite.cases import closure_of, each_class, problem, steps

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


# --- Hooks -------------------------------------------------------------------------------------------------------


@each_class
def test_step_hooks(cls):
    """test_step_pre_hook, test_step_post_hook, test_step_all_hooks: each runs once, in order, never after removal."""
    params, loss = problem()
    optimizer = cls(params)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    steps(optimizer, loss)
    assert calls == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    steps(optimizer, loss)
    assert len(calls) == 4


@each_class
def test_a_pre_hook_may_change_the_arguments(cls):
    params, _loss = problem()
    optimizer = cls(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step(lambda: 1.0) == 7.0


@each_class
def test_state_dict_hooks(cls):
    """test_state_dict_pre_hook, _post_hook, _pre_post_hook"""
    params, _ = problem()
    optimizer = cls(params, lr=1.0)

    def before(o):
        o.state["seen"] = {"calls": o.state.get("seen", {}).get("calls", 0) + 1}

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": len(s["state"])})
    got = optimizer.state_dict()
    assert got["state"]["seen"] == {"calls": 1}
    assert got["extra"] == 1


@each_class
def test_load_state_dict_hooks(cls):
    """test_load_state_dict_pre_hook_and_prepend, _post_hook, _pre_post_hook: each runs once; its result is loaded."""
    params, loss = problem()
    optimizer = cls(params, lr=0.5)
    steps(optimizer, loss)
    calls = []

    def first(o, state_dict):
        calls.append("first")
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] *= 2
        state_dict["state"][0]["exp_avg"].fill_(3.0)
        return state_dict

    def second(o, state_dict):
        calls.append("second")
        state_dict["param_groups"][0]["lr"] += 1

    def after(o):
        assert (o.state[params[0]]["exp_avg"] == 3.0).all()
        assert o.param_groups[0]["lr"] == 2.0
        calls.append("after")

    optimizer.register_load_state_dict_pre_hook(second)
    optimizer.register_load_state_dict_pre_hook(first, prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert calls == ["first", "second", "after"]
    assert not (saved["state"][0]["exp_avg"] == 3.0).any()


# --- GradScaler --------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("fused", [None, True])
def test_does_not_step_if_foundinf(cls, fused):
    """Infinite gradients skip the step and its count and lower the scale; finite ones are unscaled."""
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, plain = cls(params, fused=fused, weight_decay=0.1), cls(twins, fused=fused, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for infinite in (True, False, False, True, False):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        before = [p.detach().clone() for p in params]
        if infinite:
            params[1].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert all(map(torch.equal, params, before))
        else:
            steps(plain, twin_loss)
        assert all(map(torch.equal, params, twins))
    assert optimizer.state[params[0]]["step"] == 3
    assert scaler.get_scale() == 2.0**5
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_found_inf_is_a_sum_over_devices():
    (weight, bias), loss = problem()
    before = weight.detach().clone()
    optimizer = gradsel.MaskedAdam([weight, bias], fused=True)
    loss().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(2.0)
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad / 4 * (1 - 0.9), rtol=1e-5, atol=1e-7)


def test_unscale_and_clip_before_a_fused_step():
    """By then the gradients are unscaled, and GradScaler passes no scale."""
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, plain = gradsel.MaskedAdam(params, fused=True), gradsel.MaskedAdam(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for _ in range(3):
        closure_of(plain, twin_loss)()
        torch.nn.utils.clip_grad_norm_(twins, 0.1)
        plain.step()
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert all(map(torch.equal, params, twins))
