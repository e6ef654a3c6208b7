"""Quantised layers that cannot be trained: which they are, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradsel.quantised.adapted import FOR_INFERENCE, adapter_of
from gradsel.quantised.finding import quantised_weight
from gradsel.quantised.torchao import is_of_torchao, quantises_inputs

#: What layers call the codes of a weight that they do not keep under a name with "weight" in it.
_CODES = ("W_q",)
#: Packages of torch whose layers hold packed weights, which are neither parameters nor buffers.
_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.sparse.quantized", "torch.ao.nn.intrinsic.quantized")
#: Where such layers hold them: linear layers and convolutions, LSTM and GRU, their cells.
_PACKS = ("_packed_params", "_all_weight_values", "_packed_weight_ih")
_AUTO_ROUND = "save the model from AutoRound as GPTQ or AWQ, format='auto_gptq' or 'auto_awq', and load that"
#: What to do about layers that no adapter knows, by the package of their class.
_PACKAGES = {
    "gptqmodel": FOR_INFERENCE,
    "awq": (
        "AutoAWQ's layers compute gradients on GPUs only, and it is no longer maintained: load the checkpoint with "
        "gptqmodel, transformers' AwqConfig(backend='auto_trainable')"
    ),
    "auto_round": _AUTO_ROUND,
    "auto_round_extension": _AUTO_ROUND,
}


def opaque_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of BitNet and the like, and those of ``quantize_dynamic``, which cannot be trained.

    Their codes are buffers, integers or packed, so a model has no parameter to rank for them.

    Yields:
        The name of each layer's codes, which patterns such as ``freeze=["*.qweight"]`` match, and the layer.
    """
    for path, module in model.named_modules():
        if quantised_weight(module) is None and (codes := _codes_of(module)):
            yield f"{path}.{codes}".lstrip("."), module


def why_opaque(module: nn.Module) -> str:
    """Why such a layer cannot be trained, and what to do about it, as a part of a message."""
    return _by_its_library(module) or (
        "no way is known to make its weight dense; load the model quantised by bitsandbytes, torchao, GPTQ, AWQ, HQQ "
        "or quanto instead (docs/quantised.md)"
    )


def _by_its_library(module: nn.Module) -> str | None:
    """Why a layer of a known library cannot be trained as it is, and what to do about it; None if nothing is known."""
    if (adapter := adapter_of(module)) is not None:
        return adapter.why_not(module)
    if _is_compressed(module):
        return (
            "compressed-tensors makes it dense at the first forward in any case: load the model with "
            "CompressedTensorsConfig(dequantize=True), and train the dense weights"
        )
    kind = type(module)
    if kind.__module__.startswith("optimum.quanto"):  # QConv2d; a QLinear has an adapter
        return (
            f"of quanto's layers only QLinear can be trained: leave every {kind.__name__} out when the model is "
            "quantised, quantize(model, weights=..., exclude=[...])"
        )
    return _PACKAGES.get(kind.__module__.partition(".")[0])


def _is_compressed(module: nn.Module) -> bool:
    """Whether compressed-tensors has put a forward of its own around that of the layer, which changes the weight."""
    return hasattr(module, "quantization_scheme") and hasattr(module, "quantization_status")


def _codes_of(module: nn.Module) -> str | None:
    kind = type(module)
    if kind.__module__.startswith(_PACKED) and not kind.__name__.startswith(("LinearPacked", "PackedParam")):
        return next((name for name in _PACKS if hasattr(module, name)), None)
    if _is_compressed(module) and module._parameters.get("weight") is not None:
        return "weight"
    others = {name: held for name, held in module._parameters.items() if name != "weight"}  # rules see that one
    for name, held in {**module._buffers, **others}.items():
        if held is not None and held.dim() > 1 and (name in _CODES or "weight" in name) and _is_integer(held.dtype):
            return name
    return None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def why_unknown(module: nn.Module, parameter: Any) -> str | None:
    """What to do about a quantised weight that is of no format that can be trained, as the end of a message.

    None if nothing is known about it.
    """
    state = getattr(parameter, "quant_state", None)
    if (found := _by_its_library(module)) is not None:
        return found
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
