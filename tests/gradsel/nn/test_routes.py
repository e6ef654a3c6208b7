"""Weights that are shared, read in unusual ways or not used at all still get the right gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsel
from gradsel.attached import selected_in
from tests.support.hugging_face import hugging_face
from tests.support.selections import KINDS, random_selection


class Awkward(nn.Module):
    """Layers that attach() does not know, or that are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.read_by_parent = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 3)
        self.reflect = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv1d(8, 8, 4, padding="same")
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.up(x.mT).mT
        x = F.linear(x, self.read_by_parent.weight, self.read_by_parent.bias).tanh()
        x = self.twice(self.twice(x).tanh())
        x = torch.stack([x[i] @ self.experts[i % 3].t() for i in range(len(x))])
        x = x + self.reflect(x.mT).mT + self.same(x.mT).mT
        return x + self.recurrent(x)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_every_way_of_reading_a_weight(kind, training):
    torch.manual_seed(0)
    model = Awkward().double().train(training)
    dense = copy.deepcopy(model)
    selection = random_selection(model, kind, rank=["experts"])
    report = gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for trained in (model, dense):
        trained(x).square().sum().backward()
    for module in model.modules():
        for short, selected in selected_in(module).items():
            expected = selected.mask.gather(dense.get_parameter(selected.name).grad)
            torch.testing.assert_close(
                module._parameters[short + "_values"].grad, expected, rtol=1e-12, atol=1e-12, msg=selected.name
            )
    if kind != "whole":
        routes = {name: route.route for name, route in report.items()}
        assert routes["attention.in_proj_weight"] == routes["attention.out_proj.weight"] == "harvest"
        assert routes["up.weight"] == routes["experts"] == routes["recurrent.weight_ih_l0"] == "harvest"
        assert routes["twice.weight"] == routes["reflect.weight"] == routes["same.weight"] == "direct"
        assert routes["twice.bias"] == "whole"
        assert "harvest" in str(report)


def test_a_mixture_of_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    dense = copy.deepcopy(model)
    selection = random_selection(model)
    report = gradsel.attach(model, selection)
    assert any("experts" in name and route.route == "harvest" for name, route in report.items())
    gradsel.freeze(dense, selection)
    tokens = torch.randint(0, 40, (2, 9))
    for trained in (model, dense):
        trained(input_ids=tokens, labels=tokens).loss.backward()
    for module in model.modules():
        for short, selected in selected_in(module).items():
            expected = selected.mask.gather(dense.get_parameter(selected.name).grad)
            torch.testing.assert_close(module._parameters[short + "_values"].grad, expected, rtol=1e-4, atol=1e-6)


def test_tied_weights_share_their_values():
    model, _ = hugging_face("tied Llama")
    selection = random_selection(model, rank=["model.embed_tokens.weight"])
    gradsel.attach(model, selection)
    assert model.lm_head._parameters["weight_values"] is model.model.embed_tokens._parameters["weight_values"]
    assert len(gradsel.trainable_parameters(model)) == len({id(p) for p in model.parameters() if p.requires_grad})
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.lm_head._parameters["weight_values"] is made.model.embed_tokens._parameters["weight_values"]
    gradsel.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_values_without_a_gradient_are_reported_once():
    model = HalfUsed()
    gradsel.attach(model, random_selection(model))
    for optimizer in (gradsel.MaskedAdam(model.parameters()), torch.optim.AdamW(model.parameters())):
        model(torch.randn(3, 4)).sum().backward()
        with pytest.warns(UserWarning, match=r"1 of 2 .*no gradient .*unused\.weight"):
            optimizer.step()
        optimizer.step()


def test_a_weight_that_is_read_in_place_gets_its_gradient():
    """In-place functions of another tensor, operators by name, and nn.init of the weight itself."""
    layer = nn.Linear(3, 3)
    dense = copy.deepcopy(layer)
    selection = random_selection(layer, rank=["weight"])
    gradsel.attach(layer, selection)

    def read(module: nn.Linear) -> Tensor:
        total = torch.zeros(3, 3)
        total.add_(module.weight)
        total += 2 * module.weight
        torch._foreach_add_([total], [module.weight])
        torch.ops.aten.add_.Tensor(total, module.weight)
        return (total + torch.ops.aten.mul.Tensor(module.weight, 3.0)).square().sum()

    read(layer).backward()
    read(dense).backward()
    assert torch.equal(layer.weight_values.grad, selection["weight"].gather(dense.weight.grad))
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    assert torch.equal(layer(torch.eye(3)) - layer.bias, layer.weight.T)
    assert torch.equal(layer.weight_values, selection["weight"].gather(layer.weight))
    torch.ops.aten.mul_.Scalar(layer.weight, 2.0)
    layer(torch.eye(3))
    assert torch.equal(layer.weight_values, selection["weight"].gather(layer.weight))
