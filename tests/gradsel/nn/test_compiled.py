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
from tests.support.selections import PARTIAL, random_selection


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
