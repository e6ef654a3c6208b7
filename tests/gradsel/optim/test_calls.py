"""A step is one call, and what it remembers is dropped when it no longer holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsel
from gradsel_kernels.backends import native
from tests.gradsel.optim.cases import masked, random_masks, selection_for, wide_grads
from tests.kernels.cases import same_bits
from tests.support.toy import Toy, batches


def attached_optimizer():
    model = Toy().eval()
    gradsel.attach(model, selection_for(model))
    return model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=0.1, amsgrad=True)


def test_modes_see_one_operator_call_in_every_step():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    model, optimizer = attached_optimizer()
    for _ in range(3):
        wide_grads(model, batches()[0])
        calls = []
        with Count():
            optimizer.step()
        assert calls.count("gradsel_kernels.masked_adam_.default") == 1


@pytest.mark.skipif(native.broken is not None, reason="plans are checked by the C++ extension, which is not built")
def test_later_steps_of_an_attached_model_call_no_operator_of_torch():
    model, optimizer = attached_optimizer()
    for count in (1, 2, 3):
        wide_grads(model, batches()[0])
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
        names = [event.name for event in profile.function_events if not event.name.startswith("Optimizer.step")]
        assert bool(names) == (count == 1), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_step_remembers_is_forgotten_when_it_no_longer_holds(dtype):
    """Whatever happens to model and optimizer between steps, training continues as if nothing were cached."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 2), nn.Linear(4, 4)).to(dtype)
    selection = random_masks(plain, 0)

    def replace_weights(model, optimizer):
        for p in model.parameters():
            p.data = p.data.clone()

    def replace_state(model, optimizer):
        for p, state in list(optimizer.state.items()):
            optimizer.state[p] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    def replace_moments(model, optimizer):
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"] * 0.5

    def restride(model, optimizer):
        model.to(memory_format=torch.channels_last)

    def assign(model, optimizer):
        if not hasattr(model[0], "weight_values"):
            model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
            return
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    def freeze_one(model, optimizer):
        next(iter(optimizer.state)).grad = None

    def options(model, optimizer):
        optimizer.param_groups[0].update(lr=0.1, amsgrad=True, anchor=0.5)

    def reload(model, optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    def regroup(model, optimizer):
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = params[1:]

    changes = [
        replace_weights, replace_state, replace_moments, restride, assign, freeze_one, options, reload, regroup,
    ]  # fmt: skip
    for attached in (False, True):
        models = [copy.deepcopy(plain) for _ in range(2)]
        optimizers = []
        for model in models:
            if attached:
                gradsel.attach(model, selection)
                optimizers.append(gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01))
            else:
                optimizers.append(masked(model, selection, lr=0.01))
        for change in [lambda *_: None, *changes]:
            for _ in range(2):
                params = [[p for p in model.parameters() if p.requires_grad] for model in models]
                for p, q in zip(*params, strict=True):
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                    q.grad = p.grad.clone()
                for model, optimizer in zip(models, optimizers, strict=True):
                    change(model, optimizer)
                optimizers[1]._plans.clear()
                for optimizer in optimizers:
                    optimizer.step()
                for (name, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
                    assert same_bits(p, q), (change, name)
