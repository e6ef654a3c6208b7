"""Layers of libraries that dequantise their weights by a method of their own: GPTQ and AWQ, HQQ, quanto.

One entry of a table for each kind of layer. None of the libraries is imported before a model has a layer of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.quantised.formats import Quantised


@dataclass(frozen=True)
class Adapter:
    """How one kind of layer is asked for what it stores. Layers have ``in_features`` and ``out_features``.

    Attributes:
        library: its name, for messages.
        why_not: why a layer cannot be used as it is, and what to do about it, or None.
        kind: the name of its format.
        dtype: in which the library makes its weight dense.
        dense: the weight [out, in], a new tensor.
        codes: a tensor on its device.
        stored: codes first, then scales.
        own_state: as in :class:`~gradsel.quantised.formats.Quantised`.
        multiply: of the layer and an input in ``dtype``, as in :class:`~gradsel.quantised.formats.Quantised`.
    """

    library: str
    why_not: Callable[[Any], str | None]
    kind: Callable[[Any], str]
    dtype: Callable[[Any], torch.dtype]
    dense: Callable[[Any], Tensor]
    codes: Callable[[Any], Tensor]
    stored: Callable[[Any], list[Tensor]]
    own_state: bool = False
    multiply: Callable[[Any, Tensor], Tensor] | None = None


class Adapted(Quantised):
    """The weight of such a layer."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__(module)
        self._adapter = adapter
        self.library, self.own_state = adapter.library, adapter.own_state
        self.kind = adapter.kind(module)
        self.shape = (self.module.out_features, self.module.in_features)
        self.dtype = adapter.dtype(module)

    @property
    def device(self) -> torch.device:
        return self._adapter.codes(self.module).device

    def dense(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return self._adapter.dense(self.module).to(dtype).contiguous()

    def multiply(self, input: Tensor) -> Tensor | None:
        multiply = self._adapter.multiply
        return None if multiply is None or input.dtype is not self.dtype else multiply(self.module, input)

    def stored(self) -> list[Tensor]:
        return self._adapter.stored(self.module)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for layers of this class, whatever state they are in."""
    for kind in type(module).__mro__:
        found = ADAPTERS.get((kind.__module__.partition(".")[0], kind.__name__))
        if found is not None:
            return found
    return None


def adapted(module: nn.Module) -> Quantised | None:
    """The weight of a layer that one of these libraries has quantised and can make dense."""
    adapter = adapter_of(module)
    return None if adapter is None or adapter.why_not(module) is not None else Adapted(module, adapter)


# --- GPTQ and AWQ, by gptqmodel -------------------------------------------------------------------------------------

#: About layers of gptqmodel that are of another kind than those that can be trained.
FOR_INFERENCE = (
    "gptqmodel has chosen a kernel for inference: load the model with GPTQConfig or AwqConfig(backend='auto_trainable')"
)


def _of_gptqmodel(layout: str) -> Callable[[Any], str | None]:
    def why_not(module: Any) -> str | None:
        known = {str(getattr(each, "value", each)) for each in type(module).SUPPORTS_FORMATS}
        if not type(module).SUPPORTS_TRAINING or layout not in known:
            return FOR_INFERENCE
        mode = str(getattr(module, "linear_mode", None)).lower()
        if getattr(module, "_cpu_transformed", False) or mode.endswith("inference"):
            return (
                "gptqmodel has packed it anew for inference, at a forward in eval() mode: load the model again, and "
                "keep it in train() mode until it is attached"
            )
        if module.adapter is not None or module.online_full_had or module.online_partial_had:
            return "it computes more than the product with its weight: an adapter, or a rotation of its inputs"
        return None

    return why_not


def _of_gptq(module: Any) -> Tensor:
    dense: Tensor = type(module).dequantize_weight(module)  # not the instance's own, which torch.compile compiles
    return dense.mT


def _of_awq(module: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    dense: Tensor = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
    return dense.mT


# --- HQQ ------------------------------------------------------------------------------------------------------------


def _tensors_in(meta: Mapping[str, Any]) -> Iterator[Tensor]:
    for _, value in sorted(meta.items()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors_in(value)


# --- quanto ---------------------------------------------------------------------------------------------------------


def _not_of_quanto(module: Any) -> str | None:
    if not module.frozen:
        return "its weight is not quantised yet: optimum.quanto.freeze(model)"
    if module.activation_qtype is not None:
        return "quanto quantises the inputs of this layer, too: quantize(model, weights=...) without activations"
    return None


def _stored_by_quanto(module: Any) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    module.weight.save_to_state_dict(found, "", False)  # in one layout, whatever the kernels of this device take
    return list(found.values())


#: By the package and the name of a class of layers.
ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("gptqmodel", "PackableQuantLinear"): Adapter(
        "gptqmodel",
        why_not=_of_gptqmodel("gptq"),
        kind=lambda module: f"gptq-int{module.bits}",
        dtype=lambda module: module.scales.dtype,
        dense=_of_gptq,
        codes=lambda module: module.qweight,
        stored=lambda module: [module.qweight, module.qzeros, module.scales, module.g_idx],
    ),
    ("gptqmodel", "AWQuantLinear"): Adapter(
        "gptqmodel",
        why_not=_of_gptqmodel("gemm"),
        kind=lambda module: f"awq-int{module.bits}",
        dtype=lambda module: module.scales.dtype,
        dense=_of_awq,
        codes=lambda module: module.qweight,
        stored=lambda module: [module.qweight, module.qzeros, module.scales],
    ),
    ("hqq", "HQQLinear"): Adapter(
        "hqq",
        why_not=lambda module: None if module.ready else "it is not quantised yet: HQQLinear.initialize() does so",
        kind=lambda module: f"hqq-int{module.meta['nbits']}",
        dtype=lambda module: module.compute_dtype,
        dense=lambda module: module.dequantize(),
        codes=lambda module: module.W_q,
        stored=lambda module: [module.W_q, *_tensors_in(module.meta)],
        own_state=True,
    ),
    ("optimum", "QLinear"): Adapter(
        "quanto",
        why_not=_not_of_quanto,
        kind=lambda module: f"quanto-{module.weight.qtype.name}",
        dtype=lambda module: module.weight.dtype,
        dense=lambda module: module.weight.dequantize(),
        codes=lambda module: module.weight,
        stored=_stored_by_quanto,
        own_state=True,
        multiply=lambda module, input: F.linear(input, module.weight),
    ),
}
