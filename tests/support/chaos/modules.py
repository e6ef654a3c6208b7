"""Modules that are tied, wrapped, hooked, pruned, resized and detached."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradsel
from gradsel.attached import SUFFIX, selected_in
from tests.support.chaos.training import train
from tests.support.chaos.world import CALLED, DIM, TOKENS, Skipped, World


def tie(world: World) -> None:
    """Another module shares the weight, and trains it."""
    weight = world.model.tokens.weight
    world.model.tied = nn.Linear(DIM, 5, bias=False)
    world.model.tied.weight = weight
    x = torch.randn(2, DIM, dtype=weight.dtype)
    assert torch.equal(world.model.tied(x), x @ weight.detach().T)
    assert world.model.tied.weight is world.model.tokens.weight
    world.model(TOKENS)
    del world.model.tied


def wrap(world: World) -> None:
    if world.wrapped or world.kind not in CALLED:
        raise Skipped
    moved = world.kind == "bilinear" or world.random.random() < 0.5  # nn.Sequential passes one input only
    prefix = "box.layer." if moved else "layer.0."
    for model in (world.model, world.plain):
        if prefix == "layer.0.":
            model.layer = nn.Sequential(model.layer)
        else:
            model.box = nn.ModuleDict({"layer": model.layer})
            del model.layer
    world.known = {name.replace("layer.", prefix): tensor for name, tensor in world.known.items()}
    world.at_attach = {name.replace("layer.", prefix): before for name, before in world.at_attach.items()}
    world.wrapped = True
    world.optimizer = None


def hooked(world: World) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = world.model.head
    if world.random.random() < 0.5:
        add_hook_to_module(module, ModelHook())
        train(world)
        if world.random.random() < 0.5:
            remove_hook_from_module(module)
    else:
        handles = [module.register_forward_hook(lambda *_: None), module.register_forward_pre_hook(lambda *_: None)]
        train(world)
        for handle in handles:
            handle.remove()


def pruned(world: World) -> None:
    """The pruned weight trains under its new name; removed again, everything is as before."""
    if world.kind not in ("linear", "line", "up", "bilinear") or world.wrapped:
        raise Skipped
    layer = world.model.layer
    expected = world.output()
    prune.identity(layer, "weight")
    with torch.no_grad():
        assert torch.equal(world.model(TOKENS), expected)
    train_pruned = gradsel.trainable_parameters(world.model)
    world.loss(world.model(TOKENS)).backward()
    assert all(p.grad is not None for p in train_pruned)
    prune.remove(layer, "weight")
    world.know()


def reparametrised(world: World) -> None:
    if world.kind not in ("linear", "line", "up") or world.wrapped or not selected_in(world.model.layer):
        raise Skipped
    layer = world.model.layer
    if "weight" not in selected_in(layer):
        raise Skipped
    make = world.random.choice(
        [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
    )
    world.refuses(lambda: make(layer), RuntimeError, r"^layer\.weight is attached, so it cannot be parametrised")
    assert not parametrize.is_parametrized(layer)


def resized(world: World) -> None:
    """A parameter that is trained in part, or shared, cannot grow; one that is trained whole is missed at once."""
    path, module, short = world.random.choice(
        [(path, module, short) for path, module in world.model.named_modules() for short in module._parameters]
    )
    own = module._parameters[short]
    if own is None:
        raise Skipped
    bigger = nn.Parameter(own.new_zeros(own.shape[0] + 1, *own.shape[1:]), requires_grad=own.requires_grad)
    name = f"{path}.{short}".removeprefix(".").removesuffix(SUFFIX)
    shared = world.model.head.weight is world.model.tokens.weight and name in ("tokens.weight", "head.weight")
    before = world.at_attach["tokens.weight" if shared else name]
    if not world.selection[before].nnz:
        raise Skipped
    trained = re.escape(before)
    if shared or short in selected_in(module) or short.endswith(SUFFIX):
        words = "shared by 2 modules" if shared else "cannot be replaced by a parameter that is of shape"
        world.refuses(
            lambda: setattr(module, short, bigger), RuntimeError, f"^{trained}({SUFFIX})? is attached and {words}"
        )
        assert module._parameters[short] is own
        return
    setattr(module, short, bigger)
    for use in (gradsel.Delta.of, lambda model: gradsel.detach(model, restore=True)):
        with pytest.raises(ValueError, match=f"trained parameters are no longer part of the model.*first {trained}"):
            use(world.model)
    setattr(module, short, own)


def refused(world: World) -> None:
    """What torch would do wrong."""
    if not world.pairs():
        raise Skipped
    weight, _ = world.pairs()[0]
    name = r"^(tokens|head|layer)\S* is attached"
    uses = [
        (lambda: weight.requires_grad_(True), f"{name}: its selected entries are trained through"),
        (lambda: setattr(weight, "requires_grad", True), f"{name}: its selected entries are trained through"),
        (lambda: setattr(weight, "data", torch.zeros(9, 9)), f"{name} to a selection of its .* entries"),
        (lambda: nn.Parameter(weight), "^nn.Parameter.. of .*, which is attached"),
        (lambda: torch.autograd.grad(world.loss(world.model(TOKENS)), weight), "^autograd.grad on .*: it is attached"),
    ]
    use, words = world.random.choice(uses)
    world.refuses(use, RuntimeError, words)


def detach(world: World) -> None:
    restore = world.random.random() < 0.4
    with torch.no_grad():
        output = world.output()
    expected, base = world.dense(), world.untouched
    classes = {path: type(module) for path, module in world.plain.named_modules()}
    gradsel.detach(world.model, restore=restore)
    assert {path: type(module) for path, module in world.model.named_modules()} == classes
    left = {key for module in world.model.modules() for key in vars(module)}
    assert not any("gradsel" in key or key == "_apply" for key in left), left
    parameters = list(world.model.parameters())
    assert all(type(p) is nn.Parameter and not any("gradsel" in key for key in vars(p)) for p in parameters)
    state = world.model.state_dict()
    assert state.keys() == expected.keys()
    if restore and base is not None:
        names = {before: name for name, before in world.at_attach.items()}
        for before, p in base.named_parameters():
            assert torch.equal(state[names[before]], p), f"{before} was not restored"
    if not restore:
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name
        with torch.no_grad():
            world.assert_close(world.model(TOKENS), output)
    if world.wrapped:
        if "box" in world.model._modules:
            world.model.layer = world.model.box.layer
            del world.model.box
        else:
            world.model.layer = world.model.layer[0]
        world.wrapped = False
    world.attach()
