"""Methods that add small modules to a frozen model and train these and the head: adapters and SSF."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gradsel.methods.additions import Addition, Bottleneck, ScaleShift, sizes
from gradsel.methods.base import NO_PARTS, Context, Parts, option, require_count, require_one_of
from gradsel.methods.selected import HEAD_ONLY, Selected, by_rules
from gradsel.methods.targets import attention_outputs, is_linear, mlp_outputs, require_calls
from gradsel.parameters.rules import HEAD, RuleOptions
from gradsel.selection.selection import Selection

PLACES = ("mlp", "both")


@dataclass(frozen=True)
class Added(Selected):
    """A method that trains additions and the head."""

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        return {"head": head, "kinds": HEAD_ONLY, "whole": parts.head}

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        return by_rules(model, f"{self}, and the head", self.rules(model, context.head, context.parts))


@dataclass(frozen=True)
class Adapter(Added):
    """Bottlenecks with a residual connection behind the MLP of every block (Pfeiffer et al., EACL 2021), or behind its
    attention and its MLP (Houlsby et al., ICML 2019); normalisation stays frozen, as is usual for vision transformers.

    A hidden width of one in 64 is what the tables of SSF and GPS count.
    """

    name: ClassVar[str] = "adapter"
    summary: ClassVar[str] = "a bottleneck behind the MLP of every block, and the head"
    bottleneck: int | None = option(None, "hidden width; default: a 64th of the width of the block")
    places: str = option("mlp", "behind what: mlp, or both attention and mlp", choices=PLACES)

    def __post_init__(self) -> None:
        if self.bottleneck is not None:
            require_count("bottleneck", self.bottleneck)
        require_one_of("places", self.places, PLACES)

    def additions(
        self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]
    ) -> dict[str, Callable[[], Addition]]:
        require_calls(model, self.name)
        paths = mlp_outputs(model) + (attention_outputs(model) if self.places == "both" else [])
        made: dict[str, Callable[[], Addition]] = {}
        for path in paths:
            layer = model.get_submodule(path)
            width = sizes(layer)[1]
            hidden = max(width // 64, 1) if self.bottleneck is None else self.bottleneck
            made[path] = functools.partial(Bottleneck, width, hidden, isinstance(layer, nn.Conv2d))
        return made


@dataclass(frozen=True)
class SSF(Added):
    """A factor and a summand for every feature behind every operation (Lian et al., NeurIPS 2022): linear layers,
    convolutions and normalisation, except the head. As in the authors' code for ViT, Swin and ConvNeXt, an operation
    without a bias gets none, which could not be merged."""

    name: ClassVar[str] = "ssf"
    summary: ClassVar[str] = "scale and shift behind every linear layer, convolution and normalisation, and the head"

    def additions(
        self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]
    ) -> dict[str, Callable[[], Addition]]:
        require_calls(model, self.name)
        heads = set(whole)
        made: dict[str, Callable[[], Addition]] = {}
        for path, layer in model.named_modules():
            if _is_operation(layer) and f"{path}.weight" not in heads:
                features = layer.get_parameter("bias").numel()
                made[path] = functools.partial(ScaleShift, features, _channels_first(layer))
        if not made:
            raise ValueError(
                f"ssf goes behind linear layers, convolutions and normalisation that have a bias, and "
                f"{type(model).__name__} has none of these"
            )
        return made


_OPERATIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def _is_operation(layer: nn.Module) -> bool:
    """Whether SSF goes behind it: it has a weight and a bias, with a number for every feature of its output."""
    own = layer._parameters
    return (is_linear(layer) or isinstance(layer, _OPERATIONS)) and None not in (own.get("weight"), own.get("bias"))


def _channels_first(layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm):  # timm's name, and transformers' attribute
        return type(layer).__name__.endswith("2d") or getattr(layer, "data_format", "") == "channels_first"
    return not is_linear(layer)
