"""Small models with layers quantised by bitsandbytes and torchao, and the same models with dense weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.quantised import quantised_weight

#: The names of the formats that can be trained.
FORMATS = ("nf4", "nf4 nested", "fp4", "nf4 in bfloat16", "int8", "torchao int8", "torchao int4", "torchao float8")
INPUTS, HIDDEN, CLASSES = 64, 96, 5


class Net(nn.Module):
    """Two layers that are quantised, and a dense head."""

    def __init__(self, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.up = layer(INPUTS, HIDDEN)
        self.down = layer(HIDDEN, INPUTS)
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.down(F.gelu(self.up(x)))))


def quantised_layer(name: str, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A layer with random weights, quantised."""
    if name.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        settings = {
            "torchao int8": lambda: quantization.Int8WeightOnlyConfig(),
            "torchao int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4),
            "torchao float8": lambda: quantization.Float8WeightOnlyConfig(),
        }[name]
        layer = nn.Linear(inputs, outputs, bias)
        quantization.quantize_(layer, settings())
        return layer
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if name == "int8":
        return bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False).to("cpu")
    return bnb.nn.Linear4bit(
        inputs,
        outputs,
        bias,
        quant_type=name[:3],
        compute_dtype=torch.float32,
        compress_statistics="nested" in name,
        quant_storage=torch.bfloat16 if "bfloat16" in name else torch.uint8,
    ).to("cpu")


def quantised_net(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(lambda inputs, outputs: quantised_layer(name, inputs, outputs))


def dense_net(model: Net) -> Net:
    """The same model with the dequantised weights."""
    made = Net()
    for layer in ("up", "down"):
        quantised = quantised_weight(getattr(model, layer))
        assert quantised is not None
        getattr(made, layer).weight = nn.Parameter(quantised.dense(torch.float32))
        getattr(made, layer).bias = nn.Parameter(getattr(model, layer).bias.detach().clone())
    made.head = copy.deepcopy(model.head)
    return made


def batch(seed: int = 1, size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, INPUTS, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def stored_bits(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the bytes that the quantised layers of a model store."""
    found = {path: quantised_weight(module) for path, module in model.named_modules()}
    return {
        path: [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in each.stored()]
        for path, each in found.items()
        if each is not None
    }
