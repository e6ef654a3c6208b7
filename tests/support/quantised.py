"""Small models with layers that libraries have quantised, and the same models with dense weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.quantised import quantised_weight

#: The names of the formats that can be trained.
FORMATS = (
    "nf4", "nf4 nested", "fp4", "nf4 in bfloat16", "int8", "torchao int8", "torchao int4", "torchao float8",
    "quanto int8", "quanto int4", "hqq int4", "gptq int4", "gptq int8 act-order", "awq int4",
)  # fmt: skip
#: Those whose layers dequantise their weights by a method of their own.
ADAPTED = tuple(name for name in FORMATS if name.startswith(("quanto", "hqq", "gptq", "awq")))
INPUTS, HIDDEN, CLASSES = 64, 96, 5
#: Inputs that share a scale, where that can be chosen.
GROUP = 32


def marked(formats: Iterable[str], **marks: pytest.MarkDecorator) -> list[Any]:
    """Formats as parameters of a test, with a mark for those of a library, by the first word of their names.

    One that is not installed is then not run, while others are.
    """
    return [pytest.param(name, marks=marks.get(name.partition(" ")[0], ())) for name in formats]


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
    if name in ADAPTED:
        return quantised(name, nn.Linear(inputs, outputs, bias))
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


@torch.no_grad()
def quantised(name: str, layer: nn.Linear) -> nn.Module:
    """A layer of one of the formats :data:`ADAPTED` that stores the weight of this one."""
    if name.startswith("quanto"):
        quanto = pytest.importorskip(
            "optimum.quanto", reason="optimum-quanto is not installed: pip install optimum-quanto"
        )
        made = quanto.QLinear.from_module(layer, weights=quanto.qint8 if "int8" in name else quanto.qint4)
        made.freeze()
        return made
    if name.startswith("hqq"):
        hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed: pip install hqq")
        settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
        return hqq.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
    reason = "gptqmodel is not installed: pip install gptqmodel, which compiles one of its dependencies"
    pytest.importorskip("gptqmodel", reason=reason)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    bits, inputs = 8 if "int8" in name else 4, layer.in_features
    groups = torch.arange(inputs) // GROUP
    if "act-order" in name:
        groups = groups[torch.randperm(inputs)]
    parts = [layer.weight[:, groups == each] for each in range(inputs // GROUP)]
    lowest, highest = (torch.stack([getattr(part, of)(1) for part in parts], 1) for of in ("amin", "amax"))
    scales = (highest - lowest) / (2**bits - 1)
    zeros = (-lowest / scales).round()
    options = {
        "bits": bits, "group_size": GROUP, "sym": False, "desc_act": "act-order" in name, "in_features": inputs,
        "out_features": layer.out_features, "bias": layer.bias is not None, "register_buffers": True,
    }  # fmt: skip
    if name.startswith("gptq"):
        made = TorchLinear(**options)
        made.pack(layer, scales, zeros, groups.int())
    else:
        made = AwqTorchLinear(**options)
        made.pack(layer, scales, zeros)
    for key, packed in made.named_buffers():
        made.register_buffer(key, packed.clone())  # it packs in inference mode
    return made.train()


def quantised_net(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(lambda inputs, outputs: quantised_layer(name, inputs, outputs))


def dense_net(model: Net) -> Net:
    """The same model with the dequantised weights."""
    made = Net()
    for layer in ("up", "down"):
        weight = quantised_weight(getattr(model, layer))
        assert weight is not None
        getattr(made, layer).weight = nn.Parameter(weight.dense(torch.float32))
        bias = getattr(model, layer).bias
        if isinstance(bias, nn.Parameter):
            getattr(made, layer).bias = nn.Parameter(bias.detach().clone())
        else:  # a constant
            del getattr(made, layer).bias
            getattr(made, layer).register_buffer("bias", bias.detach().float(), persistent=False)
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
