"""Weights of torchao: tensors of a class of their own in plain ``nn.Linear`` layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.quantised.formats import Quantised

#: Attributes by which its tensors say that inputs are quantised, too.
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")


def is_of_torchao(tensor: Any) -> bool:
    return type(tensor).__module__.startswith("torchao.") and hasattr(type(tensor), "__tensor_flatten__")


def quantises_inputs(tensor: Any) -> bool:
    return any(getattr(tensor, each, None) is not None for each in _OF_ACTIVATIONS)


def weight_only(module: nn.Module) -> Quantised | None:
    """The weight of a layer whose weight alone is quantised, if torchao can make it dense."""
    weight: Any = module._parameters["weight"]
    if weight is None or type(module).forward is not nn.Linear.forward or not is_of_torchao(weight):
        return None
    if quantises_inputs(weight) or not hasattr(weight, "dequantize") or weight.ndim != 2:
        return None
    return OfTorchao(module)


class OfTorchao(Quantised):
    """A tensor of torchao with ``dequantize()``: integers of 8 bits or fewer, or float8."""

    library = "torchao"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        weight: Any = module.weight
        bits = getattr(weight, "target_dtype", None)
        self.kind = type(weight).__name__ + ("" if bits is None else f"-{str(bits).removeprefix('torch.')}")
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():  # detach() of its tensors fails in inference mode
            made: Tensor = self.module.weight.dequantize()
            return made.to(dtype).contiguous()

    def multiply(self, input: Tensor) -> Tensor | None:
        weight = self.module.weight
        return F.linear(input, weight) if input.dtype is weight.dtype else None

    def stored(self) -> list[Tensor]:
        weight = self.module.weight.detach()
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
