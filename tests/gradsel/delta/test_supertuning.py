"""Deltas as Super-Tuning adapters, against PEFT itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.parts import same_bits

peft = pytest.importorskip("peft")

LAYER = "base_model.model.layers.0."


class Net(nn.Module):
    """Layers of several sizes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 16), nn.Linear(16, 9, bias=False)])
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def tuned(base, policy, **rules):
    """The base with a task in it, and the task's delta."""
    model = copy.deepcopy(base)
    gradsel.attach(model, gradsel.select(base, None, None, policy, "random", progress=False, **rules))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    gradsel.sync(model)
    delta = Delta.of(model)
    return gradsel.detach(model), delta


def net(policy=None, dtype=torch.float32):
    torch.manual_seed(0)
    base = Net().to(dtype)
    return base, *tuned(base, policy or gradsel.PerNeuron(1), freeze=["*.bias"], whole=["head.*"])


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("policy", [gradsel.PerNeuron(1), gradsel.Rows(2), gradsel.Global(0.2)], ids=str)
def test_peft_loads_an_exported_delta(policy, tmp_path):
    base, expected, delta = net(policy)
    delta.to_supertuning(tmp_path)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(5, 7)
    torch.testing.assert_close(adapted(x), expected(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradsel.peft.accelerate(copy.deepcopy(adapted))(x), expected(x), rtol=0, atol=1e-6)
    merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-7)
        outside = ~delta[name].mask.to_dense() if name in delta else torch.ones(parameter.shape, dtype=torch.bool)
        assert same_bits(parameter[outside], base.get_parameter(name)[outside]), name


def test_logits_of_a_llama_are_equal(tmp_path):
    """Its layers have three sizes, so that most are filled up with entries that change nothing."""
    base = llama()
    expected, delta = tuned(base, gradsel.PerNeuron(2))
    delta.to_supertuning(tmp_path)
    tokens = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(adapted(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-6)
    sparsity = json.loads((tmp_path / "adapter_config.json").read_text())["sparsity"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    filled = 0
    for name, part in delta.items():
        path = "base_model.model." + name.removesuffix(".weight")
        values, indices = (tensors[f"{path}.supertuning_{what}"] for what in ("values", "indices"))
        assert len(values) == int(part.mask.numel * (1 - sparsity)) >= part.mask.nnz
        assert bool((indices[1:] > indices[:-1]).all())
        filled += len(values) - part.mask.nnz
    assert filled > 0


@pytest.mark.parametrize("numel", [7, 49, 1000, 4097, 10_000_019, 2**31 - 1])
def test_every_layer_has_room_for_its_entries(numel):
    """PEFT computes the number of entries from the sparsity, in floating point, and rounds it down."""
    from gradsel.delta.supertuning import _count, _sparsity

    for count in sorted({1, 2, 3, numel // 3, numel // 2, numel - 1, numel}):
        sparsity = _sparsity([(count, numel), (1, 64)])
        assert 0 <= sparsity < 1
        assert count <= _count(numel, sparsity) <= max(count + 1, numel // 64 + 1)
        assert _count(64, sparsity) >= 1
        peft.SupertuningConfig(sparsity=sparsity)


def test_a_round_trip_through_peft(tmp_path):
    base, _, delta = net(gradsel.PerNeuron(2))
    delta.to_supertuning(tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    back = Delta.from_supertuning(tmp_path / "theirs", base)
    assert back.keys() == delta.keys()
    for name, part in delta.items():
        assert torch.equal(back[name].mask.entries(), part.mask.entries()), name
        torch.testing.assert_close(back[name].values, part.values, rtol=0, atol=1e-7)
    merged = adapted.merge_and_unload()
    with back.applied(base):
        for name, parameter in merged.named_parameters():
            assert same_bits(base.get_parameter(name), parameter), name


@pytest.mark.parametrize("changes", [{}, {"r": 2, "lora_alpha": 3}, {"save_precomputed_indices": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_adapters_that_peft_has_trained_become_deltas(changes, dtype, tmp_path):
    torch.manual_seed(0)
    base = Net().to(dtype)
    config = peft.SupertuningConfig(
        sparsity=0.8, target_modules=["0", "1"], modules_to_save=["head"], init_weights=False, **changes
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = gradsel.MaskedAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(5, 7, dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    delta = Delta.from_supertuning(tmp_path, base)
    merged = model.merge_and_unload()
    with delta.applied(base):
        for name, parameter in merged.named_parameters():
            assert same_bits(base.get_parameter(name), parameter), name
    assert delta["layers.0.weight"].mask.is_whole == ("r" in changes)


def test_peft_trains_an_exported_delta_further_with_masked_adam(tmp_path):
    """With its parameters, MaskedAdam does what torch's Adam does, accelerated or not."""
    base, _, delta = net()
    delta.to_supertuning(tmp_path)
    states = []
    for kind, faster in ((torch.optim.Adam, False), (gradsel.MaskedAdam, False), (gradsel.MaskedAdam, True)):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        model = gradsel.peft.accelerate(model) if faster else model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert sum("supertuning_values" in name for name, _ in trained) == 2
        optimizer = kind(trained, lr=1e-2)
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        states.append({name: p.detach().clone() for name, p in trained})
    for name, expected in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-5, atol=1e-6)
    moved = [name for name in states[0] if "supertuning_values" in name and states[0][name].any()]
    assert len(moved) == 2


def test_what_it_cannot_hold_is_named(tmp_path):
    torch.manual_seed(0)
    base = Net()
    _, delta = tuned(base, gradsel.PerNeuron(1))
    with pytest.raises(ValueError, match=r"has no place for 1 parameters, first layers\.0\.bias.*drop=True"):
        delta.to_supertuning(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    delta.to_supertuning(tmp_path / "a", drop=True)
    assert Delta.from_supertuning(tmp_path / "a", base).keys() == delta.keys() - {"layers.0.bias"}
    head = Delta({name: part for name, part in delta.items() if name.startswith("head")})
    with pytest.raises(ValueError, match="two dimensions in part, and Super-Tuning"):
        head.to_supertuning(tmp_path / "b")
    delta.to_shira(tmp_path / "shira", drop=True)
    with pytest.raises(ValueError, match="is not a Super-Tuning adapter"):
        Delta.from_supertuning(tmp_path / "shira", base)
    loaded = Delta.load(saved(delta, tmp_path / "d"))
    with pytest.raises(ValueError, match=r"original entries of layers\.0\.weight are not known.*pass base="):
        loaded.to_supertuning(tmp_path / "c", drop=True)
    loaded.to_supertuning(tmp_path / "c", base=base, drop=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def saved(delta, path):
    delta.save(path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}supertuning_indices"), "has no indices"),
        (lambda t: t[f"{LAYER}supertuning_indices"].add_(500), r"indices outside \[16, 7\]"),
        (lambda t: t[f"{LAYER}supertuning_indices"].sub_(500), "indices outside"),
        (lambda t: t.update({f"{LAYER}supertuning_indices": torch.zeros(16)}), r"indices in torch\.float32"),
        (lambda t: t.update({f"{LAYER}supertuning_values": torch.zeros(16, 1)}), r"has \[16, 1\] values"),
        (lambda t: t.update({f"{LAYER}supertuning_values": torch.zeros(999)}), r"has \[999\] values"),
        (lambda t: t.update({f"{LAYER}weight": torch.zeros(16, 7)}), r"sets layers\.0\.weight twice"),
        (lambda t: t.update({f"{LAYER}supertuning_lora_A.weight": torch.zeros(2, 7)}), "no LoRA of rank None"),
        (lambda t: t.update({"base_model.model.other.weight": torch.zeros(3)}), r"'other\.weight'"),
        (lambda t: t.update({"base_model.model.head.weight": torch.zeros(4, 9)}), r"head\.weight .*4x9.*3x9"),
        (lambda t: t.update({"base_model.model.head.weight": torch.zeros(3, 9).int()}), r"is torch\.int32 in the"),
    ],
)
def test_damaged_adapters_are_refused(change, message, tmp_path):
    base, _, delta = net()
    delta.to_supertuning(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        Delta.from_supertuning(tmp_path, base)
