"""Models that several tests of the rules use."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradsel.parameters.rules import parameter_rules


class TopKRouter(nn.Linear):
    """Sends tokens to experts."""


class Adapted(nn.Module):
    """A layer of PEFT, by what it has, around nothing."""

    adapter_layer_names = ("lora_A",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Identity()
        self.lora_A = nn.Linear(4, 2, bias=False)


class Every(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(3, 4)
        self.classifier = nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.ones(4))
        self.rel_pos_h = nn.Parameter(torch.randn(5, 2))
        self.norm = nn.LayerNorm(4)
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.words = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.sinks = nn.Parameter(torch.randn(4))
        self.router = TopKRouter(4, 3, bias=False)
        self.adapted = Adapted()


OF_KIND = {
    "weight": ["proj_in.weight"],
    "bias": ["proj_in.bias"],
    "head": ["classifier.weight", "classifier.bias"],
    "layer scale": ["gamma"],
    "position table": ["rel_pos_h"],
    "normalisation": ["norm.weight", "norm.bias"],
    "position embedding": ["pos_embed"],
    "token": ["cls_token"],
    "embedding": ["words.weight"],
    "output embedding": ["lm_head.weight"],
    "router": ["router.weight"],
    "adapter": ["adapted.lora_A.weight"],
    "other": ["sinks"],
}


def actions(model: nn.Module, **options) -> dict[str, str]:
    return {name: rule.action for name, rule in parameter_rules(model, **options).items()}


def with_action(model: nn.Module, action: str, **options) -> list[str]:
    return [name for name, found in actions(model, **options).items() if found == action]


class Holder(nn.Module):
    """A module with these parts."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Block(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)


class Flat(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(3, 2)


def wrapped(model: nn.Module, name: str) -> nn.Module:
    """Wraps a model under the names that DistributedDataParallel, torch.compile or both would give it."""
    for part in name.split("+"):
        model = checkpoint_wrapper(model) if part == "checkpoint" else Holder(**{part: model})
    return model
