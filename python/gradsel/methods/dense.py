"""Methods with dense gradients, to compare with: everything, and LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from gradsel.methods.base import (
    ADAPTER,
    BUFFERS,
    SELECTION,
    WEIGHTS,
    Context,
    Method,
    Prepared,
    count,
    option,
    saved_buffers,
)
from gradsel.methods.selected import head_only
from gradsel.parameters.rules import is_transposed_linear, parameter_rules
from gradsel.selection.selection import Selection


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every parameter; the result is a whole model"
    rate: ClassVar[float] = 1e-4

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        model.requires_grad_(True)
        return Prepared(model, count(model), count(model))

    def save(self, prepared: Prepared, folder: Path) -> None:
        save_model(prepared.model, str(folder / WEIGHTS))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        load_model(model, str(folder / WEIGHTS))
        return model


@dataclass(frozen=True)
class Lora(Method):
    """LoRA by PEFT: two thin matrices beside every matrix that GPS would rank (Hu et al. 2022), and the head."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "PEFT's LoRA on every matrix that gps would rank, and the head"
    rank: int = option(8, "rank of the two matrices")
    alpha: float | None = option(None, "scale of their product; default: twice the rank")
    dropout: float = option(0.0, "dropout of their input")

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer >= 1, got {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        from peft import LoraConfig, get_peft_model

        context = context or Context()
        base, total = head_only(model, context.head), count(model)
        base.notes = {"policy": f"LoRA of rank {self.rank}; of the model itself, only the head"}
        targets, heads = _targets(model, context.head)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=heads,
        )
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            adapted = get_peft_model(model, config)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        return Prepared(adapted, trained, total, base)

    def save(self, prepared: Prepared, folder: Path) -> None:
        assert prepared.selection is not None
        prepared.selection.save(folder / SELECTION)
        prepared.model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)  # type: ignore[operator]
        if buffers := saved_buffers(prepared.model.get_base_model()):  # type: ignore[operator]
            save_file({name: tensor.contiguous() for name, tensor in buffers.items()}, str(folder / BUFFERS))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        from peft import PeftModel

        Selection.load(folder / SELECTION, model)
        adapted: nn.Module = PeftModel.from_pretrained(model, folder / ADAPTER)
        if (folder / BUFFERS).exists():
            own = saved_buffers(adapted.get_base_model())  # type: ignore[operator]
            with torch.no_grad():
                for name, tensor in load_file(str(folder / BUFFERS)).items():
                    own[name].copy_(tensor)
        return adapted


def _targets(model: nn.Module, head: Iterable[str]) -> tuple[list[str], list[str]]:
    """The modules that LoRA adapts, and those that are trained whole."""
    rules = parameter_rules(model, head=head)
    ranked = {name.rpartition(".")[0] for name, rule in rules.items() if rule.action == "rank"}
    modules = {path: module for path, module in model.named_modules() if path in ranked}
    linear = [path for path, m in modules.items() if isinstance(m, nn.Linear) or is_transposed_linear(m)]
    convolutions = [path for path, m in modules.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    targets = linear or convolutions
    if not targets:
        raise ValueError(f"LoRA finds no linear layer or convolution to adapt in {type(model).__name__}")
    heads = sorted({name.rpartition(".")[0] for name, rule in rules.items() if rule.reason == "head"} - {""})
    return targets, heads
