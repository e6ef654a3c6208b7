"""In real model families, one row of the neuron view is one output unit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradsel.papers.vit import Attention
from gradsel.parameters.rules import parameter_rules
from gradsel.views import NeuronView
from tests.support.families import noise
from tests.support.zoo import ZOO, built


def identity(parameter: Tensor) -> None:
    """Turns the last step of a layer into the identity, so that its output shows what went in."""
    parameter.data.copy_(torch.eye(*parameter.shape[-2:]).expand(parameter.shape))


def linear(module, short, rows):
    call = nn.Linear.forward if isinstance(module, nn.Linear) else type(module).forward  # a router returns more
    width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
    return lambda: call(module, noise(1, 3, width)), range(rows)


def bilinear(module, short, rows):
    return lambda: module(noise(1, 3, module.in1_features), noise(2, 3, module.in2_features)), range(rows)


def convolution(module, short, rows):
    side = [size + 2 for size in module.kernel_size]
    x = noise(1, 2, module.in_channels, *side)
    return lambda: module(x).movedim(1, -1).flatten(0, -2), range(rows)


def router(module, short, rows):
    return lambda: module(noise(1, 3, module.hidden_dim))[0], range(rows)


def grouped_linear(module, short, rows):
    return lambda: module(noise(1, 3, 1, module.input_size)).flatten(0, 1), range(rows)


def attention(module, short, rows):
    """With one head per feature and an identity as output projection, no two features ever mix."""
    module.num_heads, module.head_dim = module.embed_dim, 1
    identity(module.out_proj.weight)
    x = [noise(seed, 1, 4, width) for seed, width in enumerate((module.embed_dim, module.kdim, module.vdim))]
    x = x if module.in_proj_weight is None else [x[0]] * 3
    return lambda: module(*x)[0][0], [row % module.embed_dim for row in range(rows)]


def recurrent(module, short, rows):
    """One step of the layer that the weight belongs to: its rows are the state's units, gate after gate."""
    number, _, reverse = short.partition("_l")[2].partition("_")
    suffix = f"_l{number}" + (f"_{reverse}" if reverse else "")
    width = module._parameters[f"weight_ih{suffix}"].shape[1]
    extra = {"proj_size": module.proj_size} if module.proj_size else {}
    layer = type(module)(width, module.hidden_size, **extra)
    hidden = module.proj_size or module.hidden_size
    state = noise(2, 1, 3, hidden)
    if isinstance(module, nn.LSTM):
        state = (state, noise(3, 1, 3, module.hidden_size))

    def step():
        for own in list(layer._parameters):
            layer._parameters[own].data.copy_(module._parameters[own.removesuffix("_l0") + suffix])
        if not module.proj_size or short.startswith("weight_hr"):
            return layer(noise(1, 1, 3, width), state)[0][0]
        shown = []  # the projection shows only some of the units at a time
        for part in torch.eye(module.hidden_size).split(module.proj_size):
            layer.weight_hr_l0.data.copy_(part)
            shown.append(layer(noise(1, 1, 3, width), state)[0][0])
        return torch.cat(shown, 1)

    return step, [row % (hidden if short.startswith("weight_hr") else module.hidden_size) for row in range(rows)]


def experts(module, short, rows):
    """Every expert gets its own token; an identity as down-projection shows what gates and up-projections do."""
    kind = type(module).__name__
    dbrx = kind == "DbrxExpertGLU"
    count = module.moe_num_experts if dbrx else module.num_experts
    last = "w2" if dbrx else "down_proj"
    out, wide = (module.hidden_size, module.ffn_hidden_size) if dbrx else (16, 12)
    if short != last:
        stacked = module._parameters[last].data.view(count, -1, module._parameters[last].shape[-1])
        identity(stacked)
    x = noise(1, count, 16)

    def each():
        if kind == "Llama4TextExperts":
            return module(x)
        if not dbrx:
            return module(x, torch.arange(count)[:, None], torch.ones(count, 1))
        parts = (module._parameters[own].view(count, wide, out) for own in ("w1", "v1", "w2"))
        return torch.cat([module(x[i : i + 1], *each) for i, each in enumerate(zip(*parts, strict=True))])

    a_unit = rows // count
    units = []
    for row in range(rows):
        expert, inner = divmod(row, a_unit)
        if short != last:
            inner = (
                inner // 2 if kind == "GptOssExperts" else inner % wide
            )  # gates and ups are interleaved, or one follows the other
        units.append(expert * out + inner)
    return lambda: each().reshape(1, -1), units


PROBES = {
    nn.MultiheadAttention: attention, nn.RNNBase: recurrent, nn.Linear: linear, nn.Bilinear: bilinear,
    nn.modules.conv._ConvNd: convolution, "Conv1D": linear, "GroupedLinearLayer": grouped_linear,
    "MixtralTopKRouter": router, "GptOssTopKRouter": router, "MixtralExperts": experts, "GptOssExperts": experts,
    "Llama4TextExperts": experts, "DbrxExpertGLU": experts,
}  # fmt: skip


def probe_of(module: nn.Module) -> Callable:
    """How to look at the output units of a layer; a layer that is not in the table is an error."""
    for kind, probe in PROBES.items():
        if type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind):
            return probe
    raise KeyError(type(module))


def check_neurons(module: nn.Module, short: str, view: NeuronView) -> None:
    """Changing one row of the neuron view changes one output unit: the one that the probe names."""
    module = copy.deepcopy(module)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(0.3 * noise(number + 10, *parameter.shape))  # large enough for every change to show
    weight = module._parameters[short]
    matrix = view.of(weight.detach()).clone()
    look, units = probe_of(module)(module, short, len(matrix))
    before = look()
    assert len(units) == len(matrix)
    for row, unit in enumerate(units):
        changed = matrix.clone()
        changed[row] += 0.3 * noise(row, matrix.shape[1])
        weight.data = view.undo(changed, weight.shape).contiguous()
        moved = (look() - before).abs().amax(0) > 1e-5
        assert moved.nonzero().view(-1).tolist() == [unit], f"row {row}"


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_one_neuron_is_one_output_unit(name):
    model = built(name)
    ranked = {full: rule for full, rule in parameter_rules(model).items() if rule.action == "rank"}
    for full, rule in ranked.items():
        path, _, short = full.rpartition(".")
        try:
            check_neurons(model.get_submodule(path), short, rule.view)
        except AssertionError as error:
            raise AssertionError(full) from error


@torch.no_grad()
def test_fused_queries_keys_and_values_are_three_rows_of_neurons():
    """timm's layout: queries, then keys, then values, head by head."""
    dim = 6
    layer = Attention(dim, dim)  # heads of one feature do not mix
    identity(layer.proj.weight)
    x = noise(1, 1, 4, dim)
    before = layer(x)[0]
    weight = layer.qkv.weight.detach().clone()
    for row in range(3 * dim):
        layer.qkv.weight.copy_(weight)
        layer.qkv.weight[row] += 1 + noise(row, dim)
        moved = (layer(x)[0] - before).abs().amax(0) > 1e-6
        assert moved.nonzero().view(-1).tolist() == [row % dim]
