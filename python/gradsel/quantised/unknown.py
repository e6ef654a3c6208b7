"""Quantised layers that cannot be trained: which they are, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gradsel.quantised.torchao import is_of_torchao, quantises_inputs

#: What layers call the codes of a weight that they do not keep as a parameter named ``weight``.
_CODES = ("qweight", "W_q", "weight_packed", "weight_quantized", "packed_weight", "weight_q")


def opaque_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers of GPTQ, AWQ, HQQ and the like, whose codes are buffers and so are no parameters of the model.

    Yields:
        The name of each layer's codes, which patterns such as ``freeze=["*.qweight"]`` match, and the layer's class.
    """
    for path, module in model.named_modules():
        for codes in _CODES:
            held: Any = module._buffers.get(codes, module._parameters.get(codes))
            if isinstance(held, Tensor) and not held.is_floating_point():
                yield f"{path}.{codes}".lstrip("."), type(module).__name__
                break


def why_unknown(module: nn.Module, parameter: Any) -> str | None:
    """What to do about a quantised weight that is of no format that can be trained, as the end of a message.

    None if nothing is known about it.
    """
    state = getattr(parameter, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has packed it anew for inference on this CPU, which rounds its scales: load the model again, "
            "and keep it in train() mode until it is attached"
        )
    if type(module).__name__ == "Linear4bit" and hasattr(parameter, "bnb_quantized") and state is None:
        return "it is not quantised yet: move the model to its device, model.to(device), which quantises it"
    if getattr(parameter, "has_fp16_weights", False):
        return "load it with has_fp16_weights=False (transformers: llm_int8_has_fp16_weight=False)"
    if type(module).__name__.startswith("Embedding"):
        return "embeddings stay frozen: freeze it by name"
    if is_of_torchao(parameter):
        if quantises_inputs(parameter):
            return (
                "torchao quantises the inputs of this layer, too: use a weight-only configuration, such as "
                "Int8WeightOnlyConfig or IntxWeightOnlyConfig(torch.int4)"
            )
        if not hasattr(parameter, "dequantize"):
            return (
                f"torchao's {type(parameter).__name__} has no dequantize(): use IntxWeightOnlyConfig(torch.int4), "
                "Int8WeightOnlyConfig or Float8WeightOnlyConfig"
            )
    return None
