"""Full fine-tuning, to compare with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from gradsel.files import replacing
from gradsel.methods.base import NO_PARTS, WEIGHTS, Context, Method, Parts, Prepared, count
from gradsel.parameters.rules import HEAD


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every parameter; the result is a whole model"
    rate: ClassVar[float] = 1e-4

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        return count(model) - sum(model.get_parameter(name).numel() for name in parts.unused)

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        parts = NO_PARTS if context is None else context.parts
        model.requires_grad_(True)
        for name in parts.unused:
            model.get_parameter(name).requires_grad_(False)
        return Prepared(model, self.trained_on(model, parts=parts), count(model))

    def save(self, prepared: Prepared, folder: Path) -> None:
        with replacing(folder / WEIGHTS) as unfinished:
            save_model(prepared.model, str(unfinished))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        try:
            load_model(model, str(folder / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / WEIGHTS} cannot be read, or is of another model: {error}") from error
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model
