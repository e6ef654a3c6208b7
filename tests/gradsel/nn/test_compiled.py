"""Attached models that are compiled, exported and traced, and their memory."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.parallel
from torch import nn

import gradsel
from tests.support.every_layer import (
    RULES,
    EveryLayer,
    NotRecurrent,
    attached,
    every_layer,
    inputs,
    train,
)
from tests.support.selections import PARTIAL, check_consistent, data, random_selection, toy
from tests.support.settings import COMPILED
from tests.support.toy import cross_entropy


@pytest.mark.supports("torch.compile", "attach", "MaskedAdam")
@pytest.mark.parametrize("kind", PARTIAL)
def test_compiled_as_one_graph(kind: str) -> None:
    model: EveryLayer = every_layer()
    model.recurrent = NotRecurrent()  # torch.compile takes no recurrent layers
    gradsel.attach(model, random_selection(model, kind, **RULES))
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (compiled, eager):
        train(each)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("kind", PARTIAL)
def test_values_in_one_block_of_memory(kind: str) -> None:
    """DeepSpeed writes to a block that all values are views of, which a compiled model cannot notice."""
    model, selection = toy(kind, torch.float64)
    gradsel.attach(model.eval(), selection)
    trained = gradsel.trainable_parameters(model)
    block = torch.cat([p.detach().view(-1) for p in trained])
    for p, part in zip(trained, block.split([p.numel() for p in trained]), strict=True):
        p.data = part.view(p.shape)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = data(torch.float64)[0][0]
    for grad in (True, True, False):
        block.add_(0.1)
        with torch.set_grad_enabled(grad):
            output = compiled(images)
        assert torch.equal(output, copy.deepcopy(model)(images))


class Asking(nn.Module):
    """Looks at its weight while it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        weight = self.layer.weight
        return self.layer(x.to(weight.device, weight.dtype)) * weight.shape[0]


def test_metadata_of_weights_is_read_in_a_compiled_forward() -> None:
    model = Asking()
    gradsel.attach(model, random_selection(model))
    x = torch.randn(2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.layer.weight_values.grad is not None


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 1), nn.Linear(5, 4), nn.ConvTranspose1d(3, 4, 1)])
def test_second_derivatives_are_refused_by_a_backend_that_would_form_a_part_of_them(layer: nn.Module) -> None:
    gradsel.attach(layer, random_selection(layer))
    torch.compiler.reset()
    x = torch.randn(2, 3, 5, requires_grad=True)
    loss = torch.compile(layer, backend="eager")(x).square().sum()
    loss.backward(retain_graph=True)
    assert layer.weight_values.grad.any()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*gradsel\.detach\(model\)"):
        torch.autograd.grad(loss, (x, layer.weight_values), create_graph=True)


@pytest.mark.parametrize("grad", [True, False])
def test_exported_and_traced_models_are_those_of_the_values(grad: bool, tmp_path: Path) -> None:
    model, _, _ = attached()
    train(model)
    model.eval()
    with torch.no_grad():
        expected = model(inputs())
        assert torch.equal(torch.export.export(model, (inputs(),)).module()(inputs()), expected)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, (inputs(),)), tmp_path / "model.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(inputs()), expected)


@pytest.mark.parametrize("make", [gradsel.MaskedAdam, torch.optim.AdamW])
def test_memory_is_freed_with_the_model(make) -> None:
    import gc
    import weakref

    model, plain, _ = attached()
    optimizer = make(gradsel.trainable_parameters(model))
    train(model, optimizer=optimizer)
    alive = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
    assert plain is not None


# --- Before attach() ---------------------------------------------------------------------------------------------


@pytest.mark.supports("torch.compile", "select", "attach", "MaskedAdam", "save/load", "delta", "merge")
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_before_the_selection(way: str) -> None:
    """The selection, the trained model, its delta and its base are those of the model that is not compiled."""
    model = toy(dtype=torch.float64)[0].eval()
    model.dropout = nn.Identity()
    plain = copy.deepcopy(model)
    called = COMPILED[way](model)
    batches = data(torch.float64)
    selections = []
    for each in (called, plain):
        for loss in (cross_entropy, gradsel.contrastive(gradsel.features(each))):
            for options in ({"memory": "full"}, {"max_gradient_bytes": 12000}):
                selections.append(gradsel.select(each, batches, loss, freeze=["unused.*"], **options))
    assert selections[:4] == selections[4:]
    assert selections[0].base == selections[4].base
    before = copy.deepcopy(plain.state_dict())
    for each in (called, plain):
        gradsel.attach(each, selections[0])
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(each), lr=1e-2)
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(each.train(), batch).backward()  # changes running statistics
            optimizer.step()
        check_consistent(each)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    delta = gradsel.Delta.of(called)
    assert delta.keys() == gradsel.Delta.of(plain).keys()
    called.load_state_dict(copy.deepcopy(called.state_dict()))
    twin = copy.deepcopy(called)
    twin.load_state_dict(called.state_dict())
    assert gradsel.Delta.of(twin) == gradsel.Delta.of(called) == delta
    gradsel.detach(called, restore=True)
    for (name, tensor), original in zip(model.state_dict().items(), before.values(), strict=True):
        assert torch.equal(tensor, original), name


def test_passes_over_the_data_are_not_compiled_one_by_one() -> None:
    """Each has other parameters that require grad, and torch compiles a function only so often."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    options = {"loss": lambda model, x: model(x).square().mean(), "max_gradient_bytes": 300}
    selections = [gradsel.select(each, [torch.ones(2, 6)], **options) for each in (compiled, model)]
    assert selections[0].notes["memory"].startswith("grouped: 12 passes")
    assert selections[0] == selections[1]


def test_values_that_are_loaded_alone_reach_a_compiled_forward() -> None:
    model, selection = toy()
    trained, compiled = copy.deepcopy(model).eval(), torch.compile(model.eval(), backend="aot_eager")
    gradsel.attach(compiled, selection)
    gradsel.attach(trained, selection)
    images = data()[0][0]
    before = compiled(images)
    with torch.no_grad():
        for p in gradsel.trainable_parameters(trained):
            p.mul_(1.5)
    state = {f"_orig_mod.{name}": p for name, p in trained.named_parameters() if p.requires_grad}
    compiled.load_state_dict(state, strict=False)
    torch.testing.assert_close(compiled(images), trained(images))
    assert (before != compiled(images)).all()


@pytest.mark.parametrize("compiled", ["step", "everything"])
def test_compiled_steps_of_torch_write_the_weights(compiled: str) -> None:
    model, selection = toy(dtype=torch.float64)
    gradsel.attach(model.eval(), selection)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(gradsel.trainable_parameters(each), 0.1, momentum=0.9) for each in (model, plain)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch, step) -> None:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        step()

    torch.compiler.reset()
    step = torch.compile(lambda: optimizers[0].step(), backend="eager") if compiled == "step" else optimizers[0].step
    compiled_train = torch.compile(train, backend="eager") if compiled == "everything" else train
    for batch in data(torch.float64):
        compiled_train(model, optimizers[0], batch, step)
        train(plain, optimizers[1], batch, optimizers[1].step)
    check_consistent(model)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_compiled_wrapper_of_replicas_is_refused() -> None:
    model, selection = toy()
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*attach\(\) the model first"):
        gradsel.attach(torch.compile(nn.DataParallel(model), backend="eager"), selection)
