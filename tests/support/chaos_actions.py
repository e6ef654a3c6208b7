"""What users do with an attached model: each action takes a :class:`~tests.support.chaos.World` and checks its effect.

An action that is refused raises RuntimeError or ValueError, and must not have changed anything.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.attached import SUFFIX, selected_in
from tests.support.chaos import CALLED, DIM, TOKENS, OneLayer, World


class Skipped(Exception):
    """The action does not apply to this world."""


def _optimizer(world: World) -> torch.optim.Optimizer:
    made = [
        lambda p: gradsel.MaskedAdam(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    ]
    return world.random.choice(made)(gradsel.trainable_parameters(world.model))


def train(world: World, forward=None) -> None:
    """One step; the gradients are the selected entries of the dense ones."""
    for p in world.model.parameters():
        p.grad = None
    if world.optimizer is None or world.random.random() < 0.1:
        world.optimizer = _optimizer(world)
    dense = world.dense_gradients()
    world.loss((world.model if forward is None else forward)(TOKENS)).backward()
    _check_gradients(world, dense)
    before = [p.detach().clone() for p in gradsel.trainable_parameters(world.model)]
    torch.nn.utils.clip_grad_norm_(gradsel.trainable_parameters(world.model), 10.0)
    world.optimizer.step()
    after = gradsel.trainable_parameters(world.model)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True)) or not after, "nothing was trained"


def _check_gradients(world: World, dense: dict[str, torch.Tensor]) -> None:
    loose = world.dtype in (torch.bfloat16, torch.float16)
    tied: dict[int, list[str]] = {}
    for name, p in world.model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(p), []).append(name)
    for names in tied.values():
        values = world.model.get_parameter(names[0])
        found = [dense[plain] for name in names if (plain := name.removesuffix(SUFFIX)) in dense]
        if not values.requires_grad or values.grad is None:
            continue
        assert values.grad.dtype is values.dtype
        mask = world.selection[world.at_attach[names[0].removesuffix(SUFFIX)]]
        expected = sum(found)
        expected = mask.gather(expected) if names[0].endswith(SUFFIX) else expected
        atol = 0.1 if loose else 1e-5
        torch.testing.assert_close(values.grad, expected.to(values.grad.dtype), rtol=atol, atol=atol, msg=names[0])


def train_checkpointed(world: World) -> None:
    train(world, lambda tokens: checkpoint(world.model, tokens, use_reentrant=False))


def train_compiled(world: World) -> None:
    if world.random.random() > 0.01 or world.kind == "recurrent":
        raise Skipped
    torch.compiler.reset()
    train(world, torch.compile(world.model, backend="eager"))


def train_in_autocast(world: World) -> None:
    if world.dtype is not torch.float32:
        raise Skipped
    optimizer = world.optimizer or _optimizer(world)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = world.loss(world.model(TOKENS))
    loss.backward()
    optimizer.step()


def forward_only(world: World) -> None:
    with world.random.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
        world.model(TOKENS)


def zero_grad(world: World) -> None:
    world.model.zero_grad(set_to_none=world.random.random() < 0.5)


# --- Writing -----------------------------------------------------------------------------------------------------


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


# --- Moving, casting, copying -------------------------------------------------------------------------------------


def cast(world: World) -> None:
    dtype = world.random.choice([torch.float32, torch.float64, torch.bfloat16])
    if dtype is world.dtype:
        raise Skipped
    world.optimizer = None
    world.model.to(dtype)
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


# --- Saving and loading -------------------------------------------------------------------------------------------


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
    try:
        world.model.load_state_dict(state)
    except RuntimeError as error:
        assert "another selection" in str(error)  # noqa: PT017
    else:
        raise AssertionError("values of another selection were loaded")


def delta_round_trip(world: World) -> None:
    delta, before = gradsel.Delta.of(world.model), world.dense()
    write_values(world)
    gradsel.load_delta(world.model, delta)
    for name, tensor in world.dense().items():
        assert torch.equal(tensor, before[name]), name


# --- Modules ------------------------------------------------------------------------------------------------------


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
    """Refused at once, or at the next forward and then taken back."""
    if world.kind not in ("linear", "line", "up") or world.wrapped or not selected_in(world.model.layer):
        raise Skipped
    make = world.random.choice([parametrizations.weight_norm, parametrizations.spectral_norm])
    try:
        make(world.model.layer)
        world.model(TOKENS)
    finally:
        if parametrize.is_parametrized(world.model.layer):
            parametrize.remove_parametrizations(world.model.layer, "weight", leave_parametrized=False)
    raise AssertionError("not refused")


def refused(world: World) -> None:
    """What torch would do wrong is refused in words that name the parameter."""
    if not world.pairs():
        raise Skipped
    weight, _ = world.pairs()[0]
    match world.random.randrange(5):
        case 0:
            weight.requires_grad_(True)
        case 1:
            weight.requires_grad = True
        case 2:
            torch.autograd.grad(world.loss(world.model(TOKENS)), weight)
        case 3:
            world.model.tokens.weight = nn.Parameter(torch.zeros(6, DIM))
            raise RuntimeError("tokens.weight was trained whole")
        case 4:
            weight.data = torch.zeros(9, 9)
    raise AssertionError("not refused")


# --- The rest -----------------------------------------------------------------------------------------------------


def functional(world: World) -> None:
    own = {name: p for name, p in world.model.named_parameters() if name.endswith(SUFFIX)}
    if not own:
        raise Skipped
    others = {name: torch.randn_like(p).requires_grad_() for name, p in own.items()}
    output = torch.func.functional_call(world.model, others, (TOKENS,))
    grads = torch.autograd.grad(world.loss(output), list(others.values()))
    assert all(grad.shape == p.shape for grad, p in zip(grads, own.values(), strict=True))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(others[name])
        world.assert_close(world.output(), output)
        names = {id(p): name for name, p in own.items()}
        for _, values in world.pairs():
            mask = world.selection[world.at_attach[names[id(values)].removesuffix(SUFFIX)]]
            assert values.shape == mask.compact_shape


def freeze_values(world: World) -> None:
    for _, values in world.pairs():
        values.requires_grad_(False)
    world.model.zero_grad()
    output = world.model(TOKENS)
    if output.requires_grad:
        world.loss(output).backward()
    assert all(values.grad is None for _, values in world.pairs())
    for _, values in world.pairs():
        values.requires_grad_(True)


def sync(world: World) -> None:
    gradsel.sync(world.model)


def detach(world: World) -> None:
    restore = world.random.random() < 0.4
    with torch.no_grad():
        output = world.output()
    expected, base = world.dense(), world.untouched
    classes = {path: type(module) for path, module in world.plain.named_modules()}
    gradsel.detach(world.model, restore=restore)
    assert {path: type(module) for path, module in world.model.named_modules()} == classes
    assert not any("gradsel" in key for module in world.model.modules() for key in vars(module))
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


ACTIONS = [
    train, train, train_checkpointed, train_compiled, train_in_autocast, forward_only, zero_grad, write_values,
    write_values, write_weights, write_both, assign_parameters, cast, cast, move, copied, copied, averaged, load_own,
    load_in_another, load_plain, load_other_values, delta_round_trip, tie, wrap, hooked, pruned, reparametrised,
    refused, functional, freeze_values, sync, detach, detach,
]  # fmt: skip
