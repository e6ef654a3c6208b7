"""Whatever happens between two steps, a step that is repeated does what a step that is made anew does, to the bit."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradsel
from tests.gradsel.optim.cases import random_masks
from tests.kernels.cases import same_bits

SEQUENCES = int(os.environ.get("GRADSEL_REPEATS", "8"))
STEPS = 25


class Pair:
    """The same model and optimizer twice; the optimizers of ``anew`` forget their plans before every step."""

    def __init__(self, attached: bool, optimizers: int) -> None:
        plain = nn.Sequential(
            nn.Linear(6, 4), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Embedding(5, 4), nn.Linear(4, 4)
        )
        selection = random_masks(plain, 0)
        self.models = [copy.deepcopy(plain) for _ in range(2)]
        self.optimizers: list[list[gradsel.MaskedAdam]] = []
        for model in self.models:
            if attached:
                gradsel.attach(model, selection)
            made = []
            for part in range(optimizers):
                names = [name for name, p in model.named_parameters() if p.requires_grad][part::optimizers]
                named = [(name, model.get_parameter(name)) for name in names]
                made.append(gradsel.MaskedAdam(named, lr=0.01, masks=None if attached else selection))
            self.optimizers.append(made)

    def both(self, change: Callable[[nn.Module, list[gradsel.MaskedAdam], random.Random], None], seed: int) -> None:
        for model, optimizers in zip(self.models, self.optimizers, strict=True):
            torch.manual_seed(seed)
            change(model, optimizers, random.Random(seed))

    def check(self, what: object) -> None:
        for (name, ours), theirs in zip(
            self.models[0].state_dict().items(), self.models[1].state_dict().values(), strict=True
        ):
            assert same_bits(ours, theirs), (what, name)
        for ours, theirs in zip(*self.optimizers, strict=True):
            for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
                for key, value in mine.items():
                    same = same_bits(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
                    assert same, (what, key)


def trained(model, optimizers):
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def new_gradients(model, optimizers, chance):
    for p in trained(model, optimizers):
        p.grad = torch.randn_like(p)


def step(model, optimizers, chance):
    for optimizer in optimizers:
        optimizer.step()


def in_threads(model, optimizers, chance):
    threads = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write_a_parameter(model, optimizers, chance):
    with torch.no_grad():
        chance.choice(list(model.parameters())).mul_(0.5)


def other_memory(model, optimizers, chance):
    p = chance.choice(list(model.parameters()))
    p.data = p.data.clone()


def other_strides(model, optimizers, chance):
    model.to(memory_format=chance.choice([torch.channels_last, torch.contiguous_format]))


def other_state(model, optimizers, chance):
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    if states:
        state = chance.choice(states)
        key = chance.choice([key for key, value in state.items() if isinstance(value, torch.Tensor)])
        state[key] = state[key] + 1 if key == "step" else state[key] * 0.5


def write_a_state(model, optimizers, chance):
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["exp_avg"].mul_(0.9)


def reload(model, optimizers, chance):
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_gradient(model, optimizers, chance):
    chance.choice(trained(model, optimizers)).grad = None


def strided_gradients(model, optimizers, chance):
    for p in trained(model, optimizers):
        if p.grad is not None and p.grad.ndim == 2:
            p.grad = p.grad.t().contiguous().t()


def options(model, optimizers, chance):
    group = chance.choice(optimizers).param_groups[0]
    name, value = chance.choice(
        [
            ("lr", 0.003),
            ("anchor", 0.1),
            ("anchor", 0.0),
            ("weight_decay", 0.1),
            ("maximize", True),
            ("betas", (0.8, 0.99)),
        ]
    )
    group[name] = value


def fewer_parameters(model, optimizers, chance):
    optimizer = chance.choice(optimizers)
    group = optimizer.param_groups[0]
    if len(group["params"]) > 2:
        optimizer.state.pop(group["params"].pop(), None)
        group.get("param_names", [None]).pop()


def convert(model, optimizers, chance):
    model.double().float()


def load(model, optimizers, chance):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})


CHANGES = [
    write_a_parameter, other_memory, other_strides, other_state, write_a_state, reload, no_gradient, strided_gradients,
    options, fewer_parameters, load, convert,
]  # fmt: skip


@pytest.mark.parametrize("optimizers", [1, 2], ids=lambda n: f"{n} optimizers")
@pytest.mark.parametrize("attached", [False, True], ids=["dense gradients", "attached"])
def test_repeated_steps_equal_steps_made_anew(attached, optimizers):
    for seed in range(SEQUENCES):
        chance = random.Random(f"{seed} {attached} {optimizers}")
        pair = Pair(attached, optimizers)
        done = []
        for number in range(STEPS):
            pair.both(new_gradients, number)
            if chance.random() < 0.4:
                done.append(chance.choice(CHANGES))
                pair.both(done[-1], number)
            for optimizer in pair.optimizers[1]:
                optimizer._plans.clear()
            pair.both(in_threads if chance.random() < 0.2 else step, number)
            pair.check((seed, number, [change.__name__ for change in done]))


def test_steps_are_repeated_at_all():
    """Otherwise the test above would compare nothing."""
    pair = Pair(attached=True, optimizers=1)
    (optimizer,) = pair.optimizers[0]
    for _ in range(3):
        pair.both(new_gradients, 0)
        optimizer.step()
    plan = optimizer._plans[0]
    assert plan.holds(optimizer.param_groups[0], optimizer.state)
