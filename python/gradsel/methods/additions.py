"""Small trained modules that sit in a layer and change what it returns, without changing its own parameters.

An addition is a child of its layer, called :data:`NAME`, and a forward hook runs it. So the parameters of the model
keep their names and objects, selections and deltas fit the model as before, and copies of the model work.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.parameters.names import strip_wrappers
from gradsel.parameters.rules import is_transposed_linear
from gradsel.tensor_files import load_file

#: What an addition is called in its layer.
NAME = "added"


class Addition(nn.Module, ABC):
    """Changes what a layer returns.

    Attributes:
        linear: the weights of the layer can hold it.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        """What the layer returns instead.

        Args:
            output: what the layer has computed.
            inputs: its first argument.
        """

    def install(self, layer: nn.Module) -> None:
        """Registers the hooks that run it."""
        layer.register_forward_hook(_run)

    def merge_into(self, layer: nn.Module) -> None:
        """Makes the layer's own parameters compute the same, if :attr:`linear`."""
        raise NotImplementedError


def _run(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    changed: Tensor = layer.get_submodule(NAME)(output, inputs[0])
    return changed


def place(model: nn.Module, additions: Mapping[str, Callable[[], Addition]]) -> None:
    """Makes additions and puts them into their layers, on the device and in the dtype of a layer's parameters.

    Args:
        additions: makers by the path of the layer.

    Raises:
        ValueError: a layer has one already.
    """
    layers = {path: model.get_submodule(path) for path in additions}
    for path, layer in layers.items():
        if hasattr(layer, NAME):
            raise ValueError(f"{path}: {type(layer).__name__} has an attribute {NAME!r} already")
    for path, layer in layers.items():
        addition, like = additions[path](), next(layer.parameters())
        layer.add_module(NAME, addition.to(like.device, like.dtype))
        addition.install(layer)


def additions_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, Addition]]:
    """Every addition with the layer that it sits in, and the path of that."""
    for path, module in list(model.named_modules()):
        addition = module._modules.get(NAME)
        if isinstance(addition, Addition):
            yield path, module, addition


def addition_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all additions by name."""
    return {
        strip_wrappers(f"{path}.{NAME}.{name}"): parameter
        for path, _, addition in additions_in(model)
        for name, parameter in addition.named_parameters()
    }


@torch.no_grad()
def load_additions(model: nn.Module, path: Path) -> None:
    """Reads the parameters of all additions from a safetensors file.

    Raises:
        ValueError: the file is missing, or holds those of another model or method; nothing has changed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: what the method added to the model")
    own, saved = addition_parameters(model), load_file(str(path))
    if different := sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"{path} is of another model: {len(different)} names differ, first {different[0]}")
    for name, tensor in saved.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)} in {path}, {list(own[name].shape)} in the model")
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def require_linear(model: nn.Module, method: str) -> None:
    """Refuses a model with additions that weights cannot hold.

    Raises:
        ValueError: it has such additions.
    """
    for path, _, addition in additions_in(model):
        if not addition.linear:
            raise ValueError(
                f"{method} cannot be merged into the weights: {type(addition).__name__.lower()} in {path} is not a "
                "linear change of them"
            )


@torch.no_grad()
def merge_additions(model: nn.Module) -> nn.Module:
    """Merges every addition of a model into its layer, in place; all of them are linear."""
    for _, layer, addition in list(additions_in(model)):
        addition.merge_into(layer)
        del layer._modules[NAME]
        for key, hook in list(layer._forward_hooks.items()):
            if hook is _run:
                del layer._forward_hooks[key]
    return model


class Bottleneck(Addition):
    """Two linear layers with a GELU between them and a residual connection around them; initially the identity.

    Args:
        width: the features of the layer's output.
        hidden: those in between.
    """

    def __init__(self, width: int, hidden: int, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        if not self.channels_first:
            return output + self.up(F.gelu(self.down(output)))
        last = output.movedim(1, -1)
        return output + self.up(F.gelu(self.down(last))).movedim(-1, 1)


class LowRank(Addition):
    """LoRA beside a linear layer: the product of two thin matrices, initially zero (Hu et al., ICLR 2022).

    Args:
        layer: the layer that it will sit in.
        rank: of the product.
    """

    linear = True

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        inputs, outputs = sizes(layer)
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs, self.down), self.up)

    def merge_into(self, layer: nn.Module) -> None:
        product = self.up @ self.down
        _weight(layer).add_(product.t() if is_transposed_linear(layer) else product)


class ScaleShift(Addition):
    """One factor and one summand for each feature of the layer's output (SSF, Lian et al., NeurIPS 2022).

    Initialised as in the authors' code, N(1, 0.02) and N(0, 0.02).

    Args:
        features: of the layer's output.
        channels_first: they are in dimension 1 of the output, not in the last.
    """

    linear = True

    def __init__(self, features: int, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.scale = nn.Parameter(torch.empty(features))
        self.shift = nn.Parameter(torch.empty(features))
        nn.init.normal_(self.scale, mean=1, std=0.02)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        shape = (-1, *[1] * (output.ndim - 2)) if self.channels_first else (-1,)
        return torch.addcmul(self.shift.view(shape), output, self.scale.view(shape))

    def merge_into(self, layer: nn.Module) -> None:
        weight, bias = _weight(layer), layer.get_parameter("bias")
        last = is_transposed_linear(layer)
        weight.mul_(self.scale if last else self.scale.view(-1, *[1] * (weight.ndim - 1)))
        bias.mul_(self.scale).add_(self.shift)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    rows, cols = _weight(layer).shape[:2]
    return (rows, cols) if is_transposed_linear(layer) else (cols, rows)


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.get_parameter("weight")
    return weight
