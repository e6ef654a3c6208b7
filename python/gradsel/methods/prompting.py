"""Visual prompts: trained tokens that attention sees beside those of the image (VPT, Jia et al., ECCV 2022).

They stand behind the tokens of the image. Where they stand makes no difference: attention does not see the order of
tokens, and position embeddings are added before.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.methods.added import Added
from gradsel.methods.additions import NAME, Addition
from gradsel.methods.base import option, require_count
from gradsel.methods.targets import attention_in
from gradsel.parameters.blocks import block_names

Makers = dict[str, Callable[[], Addition]]


class Prompts(Addition):
    """Tokens in the input of a block.

    Args:
        count, width: their number and their features.
        bound: they are initialised uniformly within it.
        last: the block returns only the tokens that it was given.
    """

    def __init__(self, count: int, width: int, bound: float, last: bool = True) -> None:
        super().__init__()
        self.last = last
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.tokens.expand(len(inputs), -1, -1)], dim=1)

    def install(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(_append)
        if self.last:
            layer.register_forward_hook(functools.partial(_drop, len(self.tokens)))


class NoPrompts(Addition):
    """The end of prompts that an earlier block was given."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output[:, : -self.count]

    def install(self, layer: nn.Module) -> None:
        layer.register_forward_hook(functools.partial(_drop, self.count))


class WindowPrompts(Prompts):
    """Tokens in every window of Swin's attention, without relative positions.

    In the authors' code, too, prompts of a block pass its first normalisation, join every window, and are replaced in
    the next block.

    Args:
        norm: the normalisation in front of the attention.
    """

    def __init__(self, count: int, width: int, bound: float, norm: nn.Module) -> None:
        super().__init__(count, width, bound)
        self._norm = (norm,)  # in a tuple, since it is a part of the block, not of this

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        tokens: Tensor = self._norm[0](self.tokens)
        return torch.cat([inputs, tokens.expand(len(inputs), -1, -1)], dim=1)

    def install(self, layer: Any) -> None:
        count = len(self.tokens)
        layer.register_forward_pre_hook(functools.partial(_append_to_windows, count), with_kwargs=True)
        layer.register_forward_hook(functools.partial(_drop, count))
        if isinstance(getattr(layer, "relative_position_bias", None), nn.Module):  # transformers
            layer.relative_position_bias.register_forward_hook(functools.partial(_pad_bias, count))
        else:  # timm has no module for it
            layer._get_rel_pos_bias = functools.partial(_padded_bias, count, layer)


def _append(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (block.get_submodule(NAME)(None, inputs[0]), *inputs[1:])


def _drop(count: int, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0][:, :-count], *output[1:])
    return output[:, :-count]


def _append_to_windows(
    count: int, attention: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with prompts, and the mask of the shifted windows with as many rows and columns more."""
    tokens, *rest = inputs
    rest = [_padded(count, value) for value in rest]
    named = {name: _padded(count, value) if name.endswith("mask") else value for name, value in named.items()}
    return (attention.get_submodule(NAME)(None, tokens), *rest), named


def _padded(count: int, scores: Tensor | None) -> Tensor | None:
    return None if scores is None else F.pad(scores, (0, count, 0, count))


def _pad_bias(count: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return F.pad(output, (0, count, 0, count))


def _padded_bias(count: int, attention: Any) -> Tensor:
    return F.pad(type(attention)._get_rel_pos_bias(attention), (0, count, 0, count))


# --- The methods -------------------------------------------------------------------------------------------------

#: What attention that depends on the places of tokens has among its parameters or modules.
_PLACES = re.compile(r"relative_?position|rel_?pos|rotary|rope|attention_biases", re.IGNORECASE)


@dataclass(frozen=True)
class _VPT(Added):
    prompts: int = option(50, "tokens")

    def __post_init__(self) -> None:
        require_count("prompts", self.prompts)

    def _blocks(self, model: nn.Module) -> list[str]:
        """The blocks of a vision transformer.

        Raises:
            ValueError: the model is none.
        """
        kind, blocks = type(model).__name__, block_names(model)
        if _patches(model) is None or not blocks:
            raise ValueError(f"{self.name} prompts vision transformers, and {kind} has no patch embedding or no blocks")
        for path in blocks:
            try:
                attention_in(model, path)
            except ValueError:
                raise ValueError(
                    f"{self.name} adds tokens for attention to see, but {kind} has no attention in {path}; adapter and "
                    "ssf need none"
                ) from None
        return blocks

    def _require_plain(self, model: nn.Module) -> None:
        for module in model.modules():
            names = [*module._parameters, *(type(child).__name__ for child in module.children())]
            if any(_PLACES.search(name) for name in names):
                raise ValueError(
                    f"{self.name} adds tokens without a place, but {type(module).__name__} of {type(model).__name__} "
                    "knows a fixed number of places"
                    + ("; take vpt-deep for Swin" if _is_swin(module) and self.name != "vpt-deep" else "")
                )

    def _bound(self, model: nn.Module, width: int) -> float:
        """Of the initial values, which are uniform as in the authors' code: Xavier's, of the patch embedding."""
        patches = _patches(model)
        assert patches is not None
        return math.sqrt(6 / (patches.weight[0].numel() + width))


def _patches(model: nn.Module) -> nn.Conv2d | None:
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def _is_swin(attention: nn.Module) -> bool:
    kind = type(attention)
    timm = kind.__name__ == "WindowAttention" and kind.__module__.endswith(".swin_transformer")
    return timm or kind.__name__ == "SwinAttention"


@dataclass(frozen=True)
class VPTShallow(_VPT):
    """Prompts in the input of the first block, which then go through all blocks."""

    name: ClassVar[str] = "vpt-shallow"
    summary: ClassVar[str] = "tokens in the input of the first block of a vision transformer, and the head"
    rate: ClassVar[float] = 1e-2
    prompts: int = option(200, "tokens")

    def additions(self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]) -> Makers:
        blocks, patches = self._blocks(model), _patches(model)
        self._require_plain(model)
        assert patches is not None
        width, alone = patches.out_channels, len(blocks) == 1
        first = functools.partial(Prompts, self.prompts, width, self._bound(model, width), alone)
        made: Makers = {blocks[0]: first}
        if not alone:
            made[blocks[-1]] = functools.partial(NoPrompts, self.prompts)
        return made


@dataclass(frozen=True)
class VPTDeep(_VPT):
    """Prompts of its own in the input of every block; what became of those of the block before is dropped."""

    name: ClassVar[str] = "vpt-deep"
    summary: ClassVar[str] = "tokens in the input of every block of a vision transformer, and the head"
    rate: ClassVar[float] = 1e-2
    prompts: int = option(50, "tokens for each block")

    def additions(self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]) -> Makers:
        blocks, patches = self._blocks(model), _patches(model)
        attention = {path: attention_in(model, path) for path in blocks}
        if all(_is_swin(model.get_submodule(path)) for path in attention.values()):
            made: Makers = {}
            for path in blocks:
                norm = next(
                    module for module in model.get_submodule(path).modules() if isinstance(module, nn.LayerNorm)
                )
                width = norm.weight.numel()
                make = functools.partial(WindowPrompts, self.prompts, width, self._bound(model, width), norm)
                made[attention[path]] = make
            return made
        self._require_plain(model)
        assert patches is not None
        width = patches.out_channels
        return {path: functools.partial(Prompts, self.prompts, width, self._bound(model, width)) for path in blocks}
