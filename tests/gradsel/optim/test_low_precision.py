"""Weights in bfloat16 and float16: what masters, compensation and stochastic rounding keep, cost and save."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import gradsel
from gradsel.masks import PerRow, Whole

HOW = ["master", "kahan", "stochastic"]
HALF = [torch.bfloat16, torch.float16]


def start(dtype, **options):
    """A matrix that trains two entries per row, a bias, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 20, generator=generator).to(dtype))
    bias = nn.Parameter(torch.randn(300, generator=generator).to(dtype))
    cols = torch.tensor([[3, 11]], dtype=torch.int32).repeat(300, 1)
    masks = gradsel.Selection({"weight": PerRow(cols, (300, 20)), "bias": Whole((300,))})
    return weight, bias, gradsel.MaskedAdam([("weight", weight), ("bias", bias)], masks=masks, **options)


def train(weight, bias, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in (weight, bias):
            parameter.grad = (torch.randn(parameter.shape, generator=generator) + 1).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_steps_are_not_lost(dtype):
    """Each step is far below half a unit in the last place of most weights; 400 of them are several units."""
    wanted = start(torch.float32, lr=1e-4)
    exact = [parameter.detach().to(dtype).float() for parameter in start(dtype)[:2]]
    for parameter, value in zip(wanted[:2], exact, strict=True):
        parameter.data.copy_(value)
    train(*wanted, 400)
    errors = {}
    for how in HOW:
        weight, bias, optimizer = start(dtype, lr=1e-4, low_precision=how)
        frozen = weight.detach().clone()
        train(weight, bias, optimizer, 400)
        errors[how] = (bias.detach().float() - wanted[1].detach()).abs().mean().item()
        frozen[:, [3, 11]] = weight.detach()[:, [3, 11]]
        assert torch.equal(frozen, weight.detach())
        assert not torch.equal(weight.detach()[:, 3].float(), exact[0][:, 3])
    moved = (wanted[1].detach() - exact[1]).abs().mean().item()
    assert errors["master"] < 0.1 * moved
    assert errors["kahan"] < (0.15 if dtype is torch.bfloat16 else 0.3) * moved
    assert errors["stochastic"] < 0.6 * moved


def test_bytes_of_the_state():
    """Two entries per row and the bias, each with a step count."""
    entries, steps = 300 * 3, 2 * 4
    sizes = {}
    for how in HOW:
        *parameters, optimizer = start(torch.bfloat16, low_precision=how)
        train(*parameters, optimizer, 1)
        sizes[how] = gradsel.state_bytes(optimizer) - steps
    assert sizes == {"master": 12 * entries, "kahan": 10 * entries, "stochastic": 8 * entries}
    *parameters, optimizer = start(torch.bfloat16, low_precision="stochastic", state_dtype=torch.bfloat16, amsgrad=True)
    train(*parameters, optimizer, 1)
    assert gradsel.state_bytes(optimizer) - steps == 6 * entries


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_resuming_is_bit_equal(dtype, how):
    options = {"lr": 1e-3, "low_precision": how, "seed": 5, "state_dtype": torch.bfloat16, "amsgrad": True}
    straight = start(dtype, **options)
    train(*straight, 10)
    stopped = start(dtype, **options)
    train(*stopped, 4)
    file = io.BytesIO()
    torch.save({"optimizer": stopped[2].state_dict(), "weights": stopped[:2]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = start(dtype)  # the loaded groups bring their options
    for parameter, value in zip(resumed[:2], saved["weights"], strict=True):
        parameter.data.copy_(value)
    resumed[2].load_state_dict(saved["optimizer"])
    train(*resumed, 6, first=4)
    for parameter, expected in zip(resumed[:2], straight[:2], strict=True):
        assert torch.equal(parameter, expected)
    for parameter, expected in zip(resumed[:2], straight[:2], strict=True):
        state, other = resumed[2].state[parameter], straight[2].state[expected]
        assert state.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(other[key])) for key in state)


def test_seeds_and_places_in_the_optimizer_draw_differently():
    results = {}
    for seed in (0, 0, 1):
        weight, bias, optimizer = start(torch.bfloat16, lr=1e-3, low_precision="stochastic", seed=seed)
        train(weight, bias, optimizer, 3)
        results.setdefault(seed, []).append(weight.detach().clone())
    assert torch.equal(*results[0])
    assert not torch.equal(results[0][0], results[1][0])
    twins = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = gradsel.MaskedAdam([{"params": twins[:1]}, {"params": twins[1:]}], 1e-3, low_precision="stochastic")
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    assert not torch.equal(*twins)


@pytest.mark.parametrize("first", HOW)
@pytest.mark.parametrize("then", HOW)
def test_changing_the_option_in_the_middle(first, then):
    weight, bias, optimizer = start(torch.bfloat16, lr=1e-3, low_precision=first)
    train(weight, bias, optimizer, 3)
    for group in optimizer.param_groups:
        group["low_precision"] = then
        group["state_dtype"] = torch.bfloat16
    before = bias.detach().float() + optimizer.state[bias].get("compensation", torch.zeros(300)).float()
    train(weight, bias, optimizer, 1, first=3)
    state = optimizer.state[bias]
    kept = {"master": {"master"}, "kahan": {"compensation"}, "stochastic": set()}[then]
    assert {"master", "compensation"} & state.keys() == kept
    assert state["exp_avg"].dtype is torch.bfloat16
    if (first, then) == ("kahan", "master"):
        # The master starts from the compensated weight, and one step moves it by at most lr.
        assert (state["master"] - before).abs().max() < 1.1e-3


def test_values_of_an_attached_model_need_nothing():
    model = nn.Linear(8, 6).bfloat16()
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random"))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), 1e-3, low_precision="stochastic")
    for parameter in gradsel.trainable_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all("master" not in state for state in optimizer.state.values())
    assert torch.equal(model.weight[0, gradsel.attached.selected_in(model)["weight"].mask.cols[0].long()].float(),
                       model.weight_values[0].detach().bfloat16().float())  # fmt: skip


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"low_precision": "none"}, "low_precision.*'none'.*'master', 'kahan' or 'stochastic'"),
        ({"seed": -1}, "seed.*-1"),
        ({"seed": 2**31}, "seed.*2147483648"),
        ({"seed": 0.5}, r"seed.*0\.5"),
        ({"state_dtype": torch.float16}, r"state_dtype.*torch\.float16"),
        ({"anchor": float("inf")}, "anchor.*inf"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        gradsel.MaskedAdam([nn.Parameter(torch.zeros(2))], **option)
