"""Steps, forwards and gradients."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.attached import SUFFIX
from tests.support.chaos.world import TOKENS, Skipped, World


def make_optimizer(world: World) -> torch.optim.Optimizer:
    eps = 1e-4  # Adam's own vanishes in float16, and 0 / 0 is nan
    made = [
        lambda p: gradsel.MaskedAdam(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, eps=eps, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, eps=eps, foreach=True),
    ]
    return world.random.choice(made)(gradsel.trainable_parameters(world.model))


def train(world: World, forward=None) -> None:
    """One step; the gradients are the selected entries of the dense ones."""
    for p in world.model.parameters():
        p.grad = None
    if world.optimizer is None or world.random.random() < 0.1:
        world.optimizer = make_optimizer(world)
    dense = world.dense_gradients()
    world.loss((world.model if forward is None else forward)(TOKENS)).backward()
    check_gradients(world, dense)
    before = [p.detach().clone() for p in gradsel.trainable_parameters(world.model)]
    torch.nn.utils.clip_grad_norm_(gradsel.trainable_parameters(world.model), 10.0)
    world.optimizer.step()
    after = gradsel.trainable_parameters(world.model)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True)) or not after, "nothing was trained"


def check_gradients(world: World, dense: dict[str, torch.Tensor]) -> None:
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
        world.assert_close(values.grad, expected.to(values.grad.dtype), names[0])


def train_checkpointed(world: World) -> None:
    train(world, lambda tokens: checkpoint(world.model, tokens, use_reentrant=False))


def train_compiled(world: World) -> None:
    """In few sequences: it takes a second."""
    if world.seed % 31 or world.kind == "recurrent":
        raise Skipped
    torch.compiler.reset()
    train(world, torch.compile(world.model, backend="eager"))


def train_in_autocast(world: World) -> None:
    if world.dtype is not torch.float32:
        raise Skipped
    optimizer = world.optimizer or make_optimizer(world)
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
