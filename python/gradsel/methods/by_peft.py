"""Methods of PEFT: LoRA, SHiRA and MiSS on the matrices that GPS would rank, and the head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn

from gradsel.files import filling, replacing
from gradsel.methods.additions import sizes
from gradsel.methods.base import (
    ADAPTER,
    BUFFERS,
    NO_PARTS,
    SELECTION,
    Context,
    Method,
    Parts,
    Prepared,
    count,
    option,
    require_count,
    require_one_of,
)
from gradsel.methods.selected import HEAD_ONLY, head_only
from gradsel.methods.targets import matrices, queries_and_values, whole_modules
from gradsel.nn.buffers import saved_buffers
from gradsel.parameters.names import named_parameters
from gradsel.parameters.rules import HEAD, parameter_rules
from gradsel.selection.selection import Selection
from gradsel.tensor_files import load_file, save_file

LAYERS = ("all", "attention")


@dataclass(frozen=True)
class OfPeft(Method):
    """A method of PEFT. The head is trained whole."""

    rank: int = option(8, "rank")
    linear_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("rank", self.rank)

    @abstractmethod
    def config(self, targets: list[str], heads: list[str], seed: int) -> Any:
        """The configuration of PEFT for layers and modules of the head, by path."""

    @abstractmethod
    def added(self, layer: nn.Module) -> int:
        """The number of scalars that are trained beside a layer."""

    def targets(self, model: nn.Module, head: Iterable[str], parts: Parts = NO_PARTS) -> list[str]:
        """The layers to adapt.

        Raises:
            ValueError: there are none that this method can adapt.
        """
        found = matrices(model, head, parts)
        if self.linear_only and not all(isinstance(model.get_submodule(path), nn.Linear) for path in found):
            raise ValueError(f"{self.name} adapts nn.Linear alone, which {type(model).__name__} does not consist of")
        for path in found:
            most = self.most(model.get_submodule(path))
            if most is not None and self.rank > most:
                raise ValueError(f"{self.name} of rank {self.rank} does not fit {path}; pass a rank of at most {most}")
        return found

    def most(self, layer: nn.Module) -> int | None:
        """The highest rank that a layer takes; None: any."""
        return None

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        rules = parameter_rules(model, head=head, kinds=HEAD_ONLY, whole=parts.head)
        parameters = named_parameters(model)
        whole = sum(parameters[name].numel() for name, rule in rules.items() if rule.action == "whole")
        return whole + sum(self.added(model.get_submodule(path)) for path in self.targets(model, head, parts))

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        from peft import get_peft_model

        context = context or Context()
        base, total = head_only(model, context.head, context.parts), count(model)
        base.notes = {"policy": f"{self}; of the model itself, only the head"}
        heads = whole_modules(parameter_rules(model, **context.parts.rules(context.head)), context.parts.head)
        config = self.config(self.targets(model, context.head, context.parts), heads, context.seed)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            adapted = get_peft_model(model, config)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        return Prepared(adapted, trained, total, base)

    def save(self, prepared: Prepared, folder: Path) -> None:
        assert prepared.selection is not None
        prepared.selection.save(folder / SELECTION)
        with filling(folder / ADAPTER, index=["adapter_config.json"]) as adapter:
            prepared.model.save_pretrained(adapter, save_embedding_layers=False)  # type: ignore[operator]
        if buffers := saved_buffers(prepared.model.get_base_model()):  # type: ignore[operator]
            with replacing(folder / BUFFERS) as unfinished:
                save_file(buffers, unfinished)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        from peft import PeftModel

        Selection.load(folder / SELECTION, model)
        adapter = folder / ADAPTER
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (adapter / name).is_file():  # PEFT would look for it on the hub
                raise ValueError(f"{adapter} has no adapter of PEFT: there is no {name} in it")
        try:
            adapted: nn.Module = PeftModel.from_pretrained(model, adapter)
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{adapter} cannot be read: {error}") from error
        if (folder / BUFFERS).exists():
            own = saved_buffers(adapted.get_base_model())  # type: ignore[operator]
            with torch.no_grad():
                for name, tensor in load_file(folder / BUFFERS).items():
                    own[name].copy_(tensor)
        return adapted

    def merge(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged


@dataclass(frozen=True)
class Lora(OfPeft):
    """LoRA: two thin matrices beside every matrix (Hu et al., ICLR 2022).

    ``Lora(rank=16, layers="attention")`` is what GPS's tables count: queries and values alone. In a model with fused
    queries, keys and values, that is the fused matrix, with as many trained scalars.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "PEFT's LoRA on every matrix that gps would rank, and the head"
    linear_only: ClassVar[bool] = False
    rank: int = option(8, "rank of the two matrices")
    alpha: float | None = option(None, "scale of their product; default: twice the rank")
    dropout: float = option(0.0, "dropout of their input")
    layers: str = option("all", "all, or attention: queries and values alone", choices=LAYERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        require_one_of("layers", self.layers, LAYERS)

    def targets(self, model: nn.Module, head: Iterable[str], parts: Parts = NO_PARTS) -> list[str]:
        found = super().targets(model, head, parts)
        return found if self.layers == "all" else queries_and_values(found, model)

    def added(self, layer: nn.Module) -> int:
        if isinstance(layer, nn.Conv2d):
            return self.rank * (layer.weight[0].numel() + layer.out_channels)
        return self.rank * sum(sizes(layer))

    def config(self, targets: list[str], heads: list[str], seed: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=heads,
        )


@dataclass(frozen=True)
class Shira(OfPeft):
    """SHiRA: entries chosen at random, as many in a layer as LoRA of this rank has (Bhardwaj et al., NeurIPS 2024)."""

    name: ClassVar[str] = "shira"
    summary: ClassVar[str] = "PEFT's SHiRA: random entries of every linear layer, as many as LoRA trains, and the head"
    rank: int = option(8, "rank of the LoRA that has as many weights")

    def most(self, layer: nn.Module) -> int:
        inputs, outputs = sizes(layer)
        return inputs * outputs // (inputs + outputs)

    def added(self, layer: nn.Module) -> int:
        return self.rank * sum(sizes(layer))

    def config(self, targets: list[str], heads: list[str], seed: int) -> Any:
        from peft import ShiraConfig

        return ShiraConfig(r=self.rank, random_seed=seed, target_modules=targets, modules_to_save=heads)


@dataclass(frozen=True)
class Miss(OfPeft):
    """MiSS: one thin matrix for each linear layer, added to every shard of its inputs (Kang and Yin 2024)."""

    name: ClassVar[str] = "miss"
    summary: ClassVar[str] = "PEFT's MiSS: a thin matrix shared by all shards of a linear layer's inputs, and the head"
    rank: int = option(16, "inputs in a shard")

    def most(self, layer: nn.Module) -> int:
        return sizes(layer)[0]

    def added(self, layer: nn.Module) -> int:
        return self.rank * sizes(layer)[1]

    def config(self, targets: list[str], heads: list[str], seed: int) -> Any:
        from peft import MissConfig

        return MissConfig(r=self.rank, target_modules=targets, modules_to_save=heads)
