"""Moving, casting, copying, saving and loading."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from torch.optim.swa_utils import AveragedModel

import gradsel
from gradsel.attached import SUFFIX
from tests.support.chaos.training import train
from tests.support.chaos.world import TOKENS, OneLayer, Skipped, World
from tests.support.chaos.writing import write_values


def cast(world: World) -> None:
    """In place, or, as torch may do in future, by new parameters, which are no longer those of an optimizer."""
    dtype = world.random.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    if dtype is world.dtype:
        raise Skipped
    world.optimizer = None
    tied = world.model.head.weight is world.model.tokens.weight
    torch.__future__.set_overwrite_module_params_on_conversion(world.random.random() < 0.3 and not tied)
    try:
        world.model.half() if dtype is torch.float16 else world.model.to(dtype)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    world.plain.to(dtype)
    world.known = {name: tensor.to(dtype) for name, tensor in world.known.items()}
    world.untouched = None


def move(world: World) -> None:
    match world.random.randrange(4):
        case 0:
            world.model.to("cpu")
        case 1:
            world.model.share_memory()
        case 2:
            world.model._apply(lambda tensor: tensor.clone())
        case 3:
            world.model.cpu().train(world.random.random() < 0.5)


def copied(world: World) -> None:
    old = world.model
    hooked = "forward" in vars(old.head)  # by accelerate, whose hooks cannot be pickled
    with torch.no_grad():
        output = old(TOKENS)
    match 0 if hooked else world.random.randrange(4):
        case 0:
            world.go_on_with(copy.deepcopy(old))
        case 1:
            world.go_on_with(pickle.loads(pickle.dumps(old)))
        case 2:
            file = io.BytesIO()
            torch.save(old, file)
            file.seek(0)
            world.go_on_with(torch.load(file, weights_only=False))
        case 3:
            world.model, world.optimizer = copy.deepcopy((old, world.optimizer))
    write = world.pairs()
    if write:  # the copy is one of its own
        with torch.no_grad():
            write[0][1].add_(1.0)
            assert torch.equal(old(TOKENS), output)
            write[0][1].sub_(1.0)


def averaged(world: World) -> None:
    """A weight average, evaluated on its own and swapped in."""
    average = AveragedModel(world.model)
    average.update_parameters(world.model)
    train(world)
    average.update_parameters(world.model)
    world.model.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(average(TOKENS), world.model(TOKENS))


def load_own(world: World) -> None:
    state = copy.deepcopy(world.model.state_dict())  # with its metadata
    if world.random.random() < 0.5:
        state = dict(state)
        if not world.pairs():  # not to be told from a checkpoint of the plain model, and taken for one
            world.untouched = None
    expected = {name: tensor.clone() for name, tensor in state.items()}
    write_values(world)
    assign = world.random.random() < 0.3
    world.model.load_state_dict(state, assign=assign)
    if assign:
        world.optimizer = None
    for name, tensor in world.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def load_in_another(world: World) -> None:
    if world.wrapped:
        raise Skipped
    tied = world.model.head.weight is world.model.tokens.weight
    other = OneLayer(world.kind, tied).to(world.dtype)
    gradsel.attach(other, world.selection)
    state = copy.deepcopy(world.model.state_dict())
    items = list(state.items())
    match world.random.randrange(3):
        case 0:
            other.load_state_dict(state)
        case 1:
            other.load_state_dict(dict(items))  # as from safetensors
        case 2:
            world.random.shuffle(items)
            middle = len(items) // 2
            for shard in (items[:middle], items[middle:]):
                other.load_state_dict(dict(shard), strict=False)
    world.go_on_with(other)
    world.untouched = None
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def load_plain(world: World) -> None:
    base = {name: torch.randn_like(tensor) for name, tensor in world.known.items()}
    if "tokens.weight" in base and world.model.head.weight is world.model.tokens.weight:
        base["head.weight"] = base["tokens.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world.model.load_state_dict({**base}, strict=False)
    now = world.dense()
    for name, tensor in base.items():
        assert torch.equal(now[name], tensor), name
    world.untouched = None
    world.know()


def load_other_values(world: World) -> None:
    """Refused where the values of another selection fit by their shapes."""
    if not world.pairs() or world.wrapped:
        raise Skipped
    other = copy.deepcopy(world.model)
    gradsel.detach(other)
    masks = dict(world.selection)
    name, mask = next((name, mask) for name, mask in masks.items() if mask.nnz and not mask.is_whole)
    flipped = mask.to_dense().flip(-1)
    if torch.equal(flipped, mask.to_dense()):
        raise Skipped
    masks[name] = gradsel.masks.Flat.from_dense(flipped)
    gradsel.attach(other, gradsel.Selection(masks))
    state = other.state_dict()
    if state[f"{name}{SUFFIX}"].shape != world.model.state_dict()[f"{name}{SUFFIX}"].shape:
        raise Skipped
    words = rf"{SUFFIX} holds the values of another selection than the one that the model is attached to"
    world.refuses(lambda: world.model.load_state_dict(state), RuntimeError, words)


def delta_round_trip(world: World) -> None:
    delta, before = gradsel.Delta.of(world.model), world.dense()
    write_values(world)
    gradsel.load_delta(world.model, delta)
    for name, tensor in world.dense().items():
        assert torch.equal(tensor, before[name]), name
