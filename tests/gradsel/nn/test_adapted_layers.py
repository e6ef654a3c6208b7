"""Layers of GPTQ, AWQ, HQQ and quanto: what is particular to libraries that are asked for the dense weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from gradsel.nn.buffers import kept_buffers
from gradsel.quantised import quantised_weight
from tests.support.quantised import (  # fmt: skip
    ADAPTED,
    HIDDEN,
    INPUTS,
    Net,
    batch,
    loss,
    quantised,
    quantised_layer,
    quantised_net,
)

#: What layers call the tensors of a weight in their checkpoints.
STORED = {
    "qweight", "qzeros", "scales", "g_idx", "W_q", "scale", "zero",
    "weight._data", "weight._data._data", "weight._scale", "weight._shift",
}  # fmt: skip


def select(model: nn.Module) -> gradsel.Selection:
    return gradsel.select(model, [batch()], loss, gradsel.PerNeuron(3))


@pytest.mark.parametrize("format", ADAPTED)
def test_the_dequantised_weight_is_near_the_one_that_was_quantised(format: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, HIDDEN)
    original = layer.weight.detach().clone()
    weight = quantised_weight(quantised(format, layer))
    steps = (original.amax(1) - original.amin(1)) / (127 if "int8" in format else 15)
    for dtype in (torch.float32, torch.bfloat16):
        dense = weight.dense(dtype)
        assert dense.dtype is dtype
        assert dense.is_contiguous()
        assert dense.shape == weight.shape == original.shape
        assert bool(((dense - original).abs() <= 1.1 * steps[:, None]).all())


@pytest.mark.parametrize("format", ADAPTED)
def test_the_fingerprint_depends_on_codes_and_scales(format: str) -> None:
    weight = quantised_weight(quantised_net(format).up)
    before = weight.fingerprint()
    assert before.startswith(f"{HIDDEN}x{INPUTS} {format.partition(' ')[0]}-")
    assert quantised_weight(quantised_net(format).up).fingerprint() == before
    parts = [name for name in quantised_net(format).up.state_dict() if name in STORED]
    assert len(parts) > 1
    for part in parts:
        layer = quantised_net(format).up
        with torch.inference_mode():  # in which hqq has made them
            layer.state_dict()[part].view(-1)[0] += 1
        assert quantised_weight(layer).fingerprint() != before, part


@pytest.mark.parametrize("format", ADAPTED)
def test_a_layer_has_one_weight_and_a_bias_that_is_trained_if_it_is_a_parameter(format: str) -> None:
    model = quantised_net(format)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    selection = select(model)
    biases = {f"{layer}.bias" for layer in ("up", "down")} if format.startswith("quanto") else set()
    assert set(selection) == {"up.weight", "down.weight", "head.weight", "head.bias"} | biases
    selection.check(model)
    with pytest.raises(ValueError, match=r"2 of \d ranked and frozen parameters differ .* first up\.weight"):
        selection.check(quantised_net(format, seed=1))
    gradsel.attach(model, selection)
    assert not any("qweight" in name for name in kept_buffers(model))  # no second copy
    assert {p.dtype for p in gradsel.trainable_parameters(model)} == {torch.float32}
    steps = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    loss(model, batch()).backward()
    steps.step()
    bias, output = model.up.bias.detach().clone(), model(batch()[0])
    gradsel.merge(model, torch.float32)
    assert isinstance(model.up.bias, nn.Parameter)
    assert torch.equal(model.up.bias, bias.float())
    torch.testing.assert_close(model(batch()[0]), output)
    again = quantised_net(format)
    gradsel.attach(again, selection)
    gradsel.detach(again, restore=True)
    assert {name: buffer.tolist() for name, buffer in again.named_buffers()} == {
        name: buffer.tolist() for name, buffer in before.items()
    }


@pytest.mark.parametrize("format", ADAPTED)
def test_a_checkpoint_without_differences_is_refused(format: str) -> None:
    model = quantised_net(format)
    plain = list(model.state_dict())
    selection = select(model)
    gradsel.attach(model, selection)
    state = model.state_dict()
    assert set(state) - set(plain) == {"up.weight_values", "down.weight_values"}
    del state["up.weight_values"]
    again = quantised_net(format)
    gradsel.attach(again, selection)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"up\.weight_values\"\."):
        again.load_state_dict(state)
    other = quantised_net(format)
    gradsel.attach(other, gradsel.select(other, [batch(7)], loss, gradsel.PerNeuron(3), criterion="random"))
    with pytest.raises(RuntimeError, match=r"weight_values holds the differences of another selection"):
        other.load_state_dict(model.state_dict())
    gradsel.detach(model)
    assert list(model.state_dict()) == plain


def test_layers_that_are_used_twice_have_one_weight() -> None:
    model = quantised_net("hqq int4")
    model.again = Net()
    model.again.up = model.up
    model.again.requires_grad_(False)
    selection = gradsel.select(model, [batch()], loss, gradsel.PerNeuron(3), freeze=["again.down.*", "again.head.*"])
    assert "again.up.weight" not in selection
    gradsel.attach(model, selection)
    assert {"up.weight_values", "again.up.weight_values"} <= model.state_dict().keys()
    assert sum(p.numel() for p in gradsel.trainable_parameters(model)) == selection.trainable_count()


class Shared(nn.Module):
    """One quantised layer in two places."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.first = self.second = quantised_layer(format, HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("format", ["nf4", "quanto int8", "hqq int4"])
def test_a_shared_layer_is_merged_in_all_its_places(format: str) -> None:
    model = Shared(format)
    x, y = torch.randn(8, HIDDEN), torch.randint(5, (8,))
    pair = [(x, y)]
    gradsel.attach(model, gradsel.select(model, pair, loss, gradsel.PerNeuron(3)))
    with torch.no_grad():
        model.first.weight_values.normal_()
    expected = model(x)
    gradsel.merge(model, torch.float32)
    assert type(model.first) is nn.Linear
    assert model.second is model.first
    assert torch.allclose(model(x), expected, atol=1e-4)


@pytest.mark.parametrize("format", ["nf4", "quanto int8", "hqq int4"])
def test_a_merged_layer_has_one_dtype(format: str) -> None:
    model = quantised_net(format)
    gradsel.attach(model, select(model))
    with torch.no_grad():
        model.up.weight_values.normal_()
    gradsel.merge(model, torch.bfloat16)
    assert model.up.weight.dtype is model.up.bias.dtype is torch.bfloat16
    assert model.up(torch.randn(3, INPUTS, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("format", ["quanto int8", "hqq int4"])
def test_training_goes_on_with_an_optimizer_that_is_made_after_loading(format: str) -> None:
    """quanto's layers load into new parameters, which require grad."""
    states = []
    for _ in range(2):
        model = quantised_net(format)
        gradsel.attach(model, select(model))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if states:
            model.load_state_dict(states[0])
            assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
        optimizer = gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=1e-2)
        if states:
            optimizer.load_state_dict(states[1])
        loss(model, batch()).backward()
        optimizer.step()
        states = states or [model.state_dict(), optimizer.state_dict()]
