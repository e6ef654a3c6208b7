"""Whatever writes to values and weights, or puts others in their place."""

from __future__ import annotations

import torch
from torch import nn

from gradsel.attached import SUFFIX
from tests.support.chaos.world import TOKENS, World


def _write(tensor: nn.Parameter, new: torch.Tensor, way: int) -> None:
    with torch.no_grad():
        match way:
            case 0:
                tensor.copy_(new)
            case 1:
                tensor.data.copy_(new)
            case 2:
                tensor.data = new.clone()
            case 3:
                tensor[...] = new
            case 4:
                torch._foreach_copy_([tensor], [new])
            case 5:
                torch._foreach_copy_([tensor.data], [new])
            case 6:
                tensor.zero_().add_(new)
            case 7:
                tensor.data.view(-1).copy_(new.reshape(-1))
            case 8:
                tensor.data[...] = new
            case 9:
                tensor.detach().copy_(new)
            case 10:
                nn.init.zeros_(tensor)
                tensor += new
            case 11:
                torch.add(new, 0, out=tensor.detach())
            case 12:
                tensor.set_(new.clone())


WAYS = 13


def write_values(world: World) -> None:
    for _, values in world.pairs():
        new = torch.randn_like(values)
        _write(values, new, world.random.randrange(WAYS))
        assert torch.equal(values, new)


def write_weights(world: World) -> None:
    expected = []
    for weight, _ in world.pairs():
        new = torch.randn_like(weight)
        _write(weight, new, world.random.randrange(WAYS))
        expected.append((weight, new))
    world.untouched = None
    if world.random.random() < 0.5:
        world.model(TOKENS)
    for weight, new in expected:
        assert torch.equal(weight, new)
    for weight, values in world.pairs():
        assert values.shape is not None
        assert any(weight is other for other, _ in expected)
    world.know()


def write_both(world: World) -> None:
    """The later write counts."""
    for weight, values in world.pairs():
        first, second = (weight, values)[:: world.random.choice([1, -1])]
        _write(first, torch.randn_like(first), world.random.randrange(12))
        new = torch.randn_like(second)
        _write(second, new, world.random.randrange(12))
        with torch.no_grad():
            world.model(TOKENS)
        assert torch.equal(second, new)
    world.untouched = None
    world.know()


def assign_parameters(world: World) -> None:
    """Only where one module holds the parameter."""
    tied = world.model.head.weight is world.model.tokens.weight
    for path, module in world.model.named_modules():
        for short, p in list(module._parameters.items()):
            name = f"{path}.{short}".removeprefix(".")
            plain = name.removesuffix(SUFFIX)
            if plain not in world.at_attach or world.random.random() < 0.5 or (tied and "layer" not in name):
                continue
            new = torch.randn_like(p)
            setattr(module, short, nn.Parameter(new.clone(), requires_grad=p.requires_grad))
            with torch.no_grad():
                world.model(TOKENS)
            assert torch.equal(getattr(module, short), new)
            if not short.endswith(SUFFIX):
                world.untouched = None
            world.optimizer = None
    world.know()
