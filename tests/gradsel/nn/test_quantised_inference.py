"""Quantised layers in eval() mode without gradients: their library multiplies, and the sparse product is added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradsel
from gradsel.quantised import layers
from tests.support.quantised import ADAPTED, FORMATS, INPUTS, batch, loss, quantised_net, stored_bits

POLICIES = {
    "per-row": gradsel.PerNeuron(3),
    "irregular": gradsel.Global(0.02),
    "rows": gradsel.Rows(2),
    "columns": gradsel.Columns(2),
}
#: Those whose library makes the weight dense for every product, in inference as well.
ALWAYS_DENSE = tuple(name for name in ADAPTED if not name.startswith("quanto"))


@pytest.fixture
def densified(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Fills with a dtype for each weight that is made dense."""
    found = []
    make = layers.with_differences

    def counted(weight, dtype, *others):
        found.append(dtype)
        return make(weight, dtype, *others)

    monkeypatch.setattr(layers, "with_differences", counted)
    return found


def attached(format: str, policy: str = "per-row") -> tuple[nn.Module, gradsel.Selection]:
    """A net that is attached, with differences, in ``eval()`` mode."""
    model = quantised_net(format)
    selection = gradsel.select(model, [batch()], loss, POLICIES[policy])
    gradsel.attach(model, selection)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.weight_values.normal_(0.0, 0.1)
    return model.eval(), selection


def differences(layer: nn.Module, selection: gradsel.Selection) -> Tensor:
    mask = selection["up.weight"]
    dense = torch.zeros(mask.shape)
    mask.scatter_(dense, layer.weight_values.detach())
    return dense


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("format", FORMATS)
def test_differences_are_added_to_what_the_library_computes(format: str, policy: str, densified: list) -> None:
    model, selection = attached(format, policy)
    before = stored_bits(model)
    x = batch()[0][:2]
    densified.clear()
    with torch.no_grad():
        found = model.up(x)
        added = x @ differences(model.up, selection).T
        model.up.weight_values.zero_()
        base = model.up(x)
    assert len(densified) == (2 if format in ALWAYS_DENSE else 0)
    assert added.abs().max() > 0.05
    torch.testing.assert_close(found - base, added, rtol=1e-4, atol=1e-2 if format.startswith("awq") else 1e-4)
    after = stored_bits(model)
    assert all(torch.equal(a, b) for path in before for a, b in zip(before[path], after[path], strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_inference_agrees_with_training(format: str) -> None:
    model, _ = attached(format)
    x = batch()[0]
    expected = model.train()(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        if format == "quanto int4" and mode is torch.inference_mode:
            continue  # quanto's own layers cannot
        with mode():
            found = model.eval()(x[:1])
        # LLM.int8() quantises inputs in inference
        tolerance = {"int8": 0.05, "awq int4": 1e-2}.get(format, 1e-4)
        torch.testing.assert_close(found, expected[:1], rtol=tolerance, atol=tolerance)
    model.train()
    loss(model, batch()).backward()
    assert model.up.weight_values.grad.any()


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao int8"])
def test_where_the_weight_is_made_dense(format: str, densified: list) -> None:
    model, selection = attached(format)
    mask = selection["up.weight"]
    most = mask.numel // mask.nnz  # tokens whose sparse product takes as many multiplications as the weight has entries
    cases = [(most, True, True, 0), (most + 1, True, True, 1), (1, False, True, 1), (1, True, False, 1)]
    for tokens, evaluating, without_gradients, count in cases:
        densified.clear()
        with torch.set_grad_enabled(not without_gradients):
            model.train(not evaluating).up(torch.randn(tokens, INPUTS))
        assert len(densified) == count, (tokens, evaluating, without_gradients)


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao int8"])
def test_a_trained_bias_keeps_its_dtype_and_is_added(format: str) -> None:
    model, _ = attached(format)
    assert model.up.bias.requires_grad
    dtype, before = model.up.bias.dtype, model.up.bias.detach().clone()
    x = torch.randn(2, INPUTS, dtype=torch.bfloat16 if format != "torchao int8" else torch.float32)
    with torch.no_grad():
        found = model.up(x)
        model.up.bias.add_(1.0)
        more = model.up(x)
        assert model.up.bias.dtype is dtype
        assert torch.equal(model.up.bias, before + 1.0)
    torch.testing.assert_close(more.float() - found.float(), torch.ones(found.shape), rtol=0.0, atol=0.05)


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao int8", "quanto int8"])
def test_a_delta_is_applied_likewise(format: str, densified: list) -> None:
    model, selection = attached(format)
    delta = gradsel.Delta.of(model, selection=selection)
    other = quantised_net(format).eval()
    x = batch()[0][:2]
    densified.clear()
    with torch.no_grad(), delta.applied(other):
        found = other(x)
        torch.testing.assert_close(found, model(x))
    assert not densified


@pytest.mark.parametrize("shape", [(INPUTS,), (2, 3, INPUTS), (0, INPUTS)], ids=str)
def test_inputs_of_other_shapes(shape: tuple[int, ...]) -> None:
    for format in ("nf4", "int8", "torchao int8"):
        model, _ = attached(format)
        x = torch.randn(shape)
        with torch.no_grad():
            found = model.up(x)
        assert found.shape == (*shape[:-1], model.up.bias.numel())
        expected = model.up(x.requires_grad_()).detach()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
