"""Deltas as SHiRA adapters, against PEFT itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.parts import same_bits

peft = pytest.importorskip("peft")


INDICES, WEIGHT = (f"base_model.model.layers.0.shira_{part}" for part in ("indices", "weight"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def tuned_net(k=1, dtype=torch.float32, **rules):
    torch.manual_seed(0)
    base = Net().to(dtype)
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(k), "random", progress=False, **rules)
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gradsel.sync(model)
    delta = Delta.of(model)
    return base, gradsel.detach(model), delta


NO_BIAS = {"freeze": ["layers.*.bias"]}


@pytest.mark.parametrize("k", [1, 3])
def test_peft_loads_an_exported_delta(k, tmp_path):
    base, tuned, delta = tuned_net(k, **NO_BIAS)
    delta.to_shira(tmp_path)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(adapted(x), tuned(x))
    merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, tuned.get_parameter(name), rtol=0, atol=1e-7)
        outside = ~delta[name].mask.to_dense() if name in delta else torch.ones(parameter.shape, dtype=torch.bool)
        assert same_bits(parameter[outside], base.get_parameter(name)[outside]), name
    rows = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found["base_model.model.layers.0.shira_weight"].numel() == rows * 24  # PEFT insists on it
    assert "base_model.model.head.weight" in found


def test_a_round_trip_through_peft(tmp_path):
    base, _, delta = tuned_net(2, **NO_BIAS)
    delta.to_shira(tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    back = Delta.from_shira(tmp_path / "theirs", base)
    assert back.keys() == delta.keys()
    for name, part in delta.items():
        assert torch.equal(back[name].mask.entries(), part.mask.entries()), name
        torch.testing.assert_close(back[name].values, part.values, rtol=0, atol=1e-7)
    with back.applied(base):  # it knows the base that was passed when it was read
        merged = adapted.merge_and_unload()
        for name, parameter in merged.named_parameters():
            assert same_bits(base.get_parameter(name), parameter), name
    again = Delta.from_shira(tmp_path / "ours", base.state_dict())
    assert again == back


def test_differences_are_not_exact_in_low_precision(tmp_path):
    base, tuned, delta = tuned_net(2, torch.bfloat16, **NO_BIAS)
    delta.to_shira(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, tuned.get_parameter(name), rtol=2**-7, atol=1e-6)
    back = Delta.from_shira(tmp_path, base)
    with back.applied(base):
        for name, parameter in merged.named_parameters():
            assert same_bits(base.get_parameter(name), parameter), name


def test_what_shira_cannot_hold_is_named(tmp_path):
    base, _, delta = tuned_net()
    with pytest.raises(ValueError, match=r"2 parameters.*layers\.0\.bias.*drop=True"):
        delta.to_shira(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    delta.to_shira(tmp_path / "a", drop=True)
    assert Delta.from_shira(tmp_path / "a", base).keys() == delta.keys() - {"layers.0.bias", "layers.1.bias"}
    head = Delta({name: part for name, part in delta.items() if name.startswith("head")})
    with pytest.raises(ValueError, match="two dimensions"):
        head.to_shira(tmp_path / "b")
    with pytest.raises(ValueError, match=r"layers\.0\.weight .*r = 45.*1080 .*128"):
        large(delta).to_shira(tmp_path / "c", drop=True)


def large(delta):
    """Adds a layer whose r is too large for the others."""
    base = nn.Module()
    base.wide = nn.Linear(100, 100, bias=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.wide.weight[:, :90] += 1
    return Delta({**delta, **Delta.of(tuned, base=base)})


def test_originals_come_from_the_base_where_the_file_lacks_them(tmp_path):
    base, _, delta = tuned_net(**NO_BIAS)
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    with pytest.raises(ValueError, match=r"layers\.0\.weight .*pass base="):
        loaded.to_shira(tmp_path / "a")
    loaded.to_shira(tmp_path / "a", base=base)
    delta.to_shira(tmp_path / "b")
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.layers.0.shira_indices": torch.zeros(3, 24)}), "no indices"),
        (lambda t: t.pop("base_model.model.layers.0.shira_indices"), "no indices"),
        (lambda t: t["base_model.model.layers.0.shira_indices"].add_(100), "indices outside"),
        (lambda t: t["base_model.model.layers.0.shira_indices"].sub_(100), "indices outside"),
        (lambda t: t.update({INDICES: t[INDICES].float()}), r"layers\.0\.weight: .*indices in torch\.float32"),
        (lambda t: t.update({INDICES: t[INDICES].bool()}), r"indices in torch\.bool"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].int()}), r"layers\.0\.weight is torch\.int32 in the adapter"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}), r"is torch\.float8_e4m3fn in the adapter"),
        (lambda t: t.update({WEIGHT.replace("shira_", ""): torch.zeros(16, 8)}), r"sets layers\.0\.weight twice"),
        (lambda t: t.update({"base_model.model.other.weight": torch.zeros(3)}), r"'other\.weight'"),
        (lambda t: t.update({"base_model.model.head.weight": torch.zeros(9, 8)}), r"head\.weight .*9x8.*3x8"),
    ],
)
def test_damaged_adapters_are_refused(change, message, tmp_path):
    base, _, delta = tuned_net(**NO_BIAS)
    delta.to_shira(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        Delta.from_shira(tmp_path, base)


def test_other_folders_are_no_adapters(tmp_path):
    with pytest.raises(ValueError, match="adapter of PEFT"):
        Delta.from_shira(tmp_path, Net())
    base, _, delta = tuned_net(**NO_BIAS)
    delta.to_shira(tmp_path)
    for text, message in [
        ('{"peft_type": "LORA"}', "not a SHiRA adapter"),
        ("[]", "not a SHiRA adapter"),
        ("[" * 100_000, "not an adapter of PEFT"),
        ("\x00", "not an adapter of PEFT"),
    ]:
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Delta.from_shira(tmp_path, base)


def test_a_base_with_the_delta_in_it_has_no_differences_to_write(tmp_path):
    model = nn.Sequential(nn.Linear(12, 10))
    gradsel.attach(
        model, gradsel.select(model, None, None, criterion="random", policy=gradsel.PerNeuron(6), freeze=["0.bias"])
    )
    with torch.no_grad():
        model[0].weight_values.add_(1)
    gradsel.sync(model)
    delta = Delta.of(model)
    base = gradsel.detach(model, restore=True)
    delta.save(tmp_path / "d")
    delta = Delta.load(tmp_path / "d")  # the original entries were not saved
    delta.to_shira(tmp_path / "right", base=base)
    with delta.applied(base), pytest.raises(ValueError, match=r"0\.weight of the base"):
        delta.to_shira(tmp_path / "wrong", base=base)


def test_a_bias_that_is_set_in_part_is_not_saved_whole(tmp_path):
    base = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[:, 0] += 1
        tuned[1].weight += 1
        tuned[1].bias[1:] += 1
    delta = Delta.of(tuned, base=base)
    with pytest.raises(ValueError, match=r"1 parameter.*1\.bias"):
        delta.to_shira(tmp_path / "all", base=base)
