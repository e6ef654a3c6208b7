"""Models of PEFT beside selected entries: the base is ranked, adapters are trained whole, and both are merged."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from torch import nn

import gradsel
from gradsel.parameters.rules import parameter_rules
from tests.support.deltas import plain

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def loss(model, batch):
    return model(batch).square().sum()


def lora(**changes):
    config = {"r": 2, "target_modules": ["up", "down"], "modules_to_save": ["head"], "init_lora_weights": False}
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), peft.LoraConfig(**config | changes))


def selection_of(model, **rules):
    batches = [torch.randn(5, 12, generator=torch.Generator().manual_seed(1))]
    return gradsel.select(model, batches, loss, gradsel.PerNeuron(2), progress=False, **rules)


def test_the_base_is_ranked_and_adapters_are_trained_whole():
    model = lora()
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=["up"]))
    selection = selection_of(model)
    for name, mask in selection.items():
        if "idle" in name:
            assert mask.label == "inactive adapter", name
        elif "original_module" in name:
            assert mask.label == "PEFT trains a copy", name
        elif "lora_" in name or "modules_to_save" in name or name.endswith("bias"):
            assert mask.is_whole, name
        else:
            assert "base_layer.weight" in name
            assert mask.nnz == 2 * mask.shape[0], name
    frozen = selection_of(model, kinds={"adapter": "freeze"})
    assert not any(mask.nnz for name, mask in frozen.items() if "lora_" in name)


def test_what_is_ranked_is_as_without_peft():
    """Adapters that do nothing yet change no gradient of the base, so the same entries are chosen."""
    torch.manual_seed(0)
    base = Net()
    expected = selection_of(base)
    found = selection_of(lora(init_lora_weights=True, modules_to_save=None))
    for short in ("up", "down"):
        ours = found[f"base_model.model.{short}.base_layer.weight"]
        assert torch.equal(ours.entries(), expected[f"{short}.weight"].entries())


def test_lora_and_selected_entries_train_and_merge():
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    selection = selection_of(model)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    x = torch.randn(5, 12)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    expected = model(x).detach()
    trained = plain(model)
    for name, p in trained.named_parameters():
        moved = p.detach() != before[name]
        assert torch.equal(moved, selection[name].to_dense() & moved), name
        assert bool(moved.any()) == bool(selection[name].nnz), name
    torch.testing.assert_close(trained(x), expected)
    merged = trained.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_other_tuners_and_prompts():
    """Every parameter that get_peft_model adds is of the kind "adapter", and the base keeps its kinds."""
    base = parameter_rules(Net())
    configs = [
        peft.LoraConfig(r=2, target_modules=["up"], use_dora=True),
        peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
        peft.ShiraConfig(r=1, target_modules=["up"]),
        peft.SupertuningConfig(sparsity=0.5, target_modules=["up"], r=2),
        peft.VeraConfig(r=2, target_modules=["up"]),
    ]
    for config, number in zip(configs, count()):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(Net()), config)
        for name, rule in parameter_rules(model).items():
            old = name.removeprefix("base_model.model.").replace("base_layer.", "")
            if old in base:
                assert rule.action == base[old].action, (number, name)
            else:
                trained = model.get_parameter(name).requires_grad
                assert (rule.action, rule.reason) in (("whole", "adapter"), ("freeze", "inactive adapter")), name
                assert (rule.action == "whole") == trained, (number, name)
