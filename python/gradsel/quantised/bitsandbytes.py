"""Weights of bitsandbytes: ``Linear4bit`` (nf4 and fp4) and ``Linear8bitLt``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsel.quantised.formats import Quantised


def _is_of_bitsandbytes(module: nn.Module, kind: str) -> bool:
    return any(base.__name__ == kind and base.__module__.startswith("bitsandbytes") for base in type(module).__mro__)


def four_bit(module: nn.Module) -> Quantised | None:
    """The weight of a ``Linear4bit`` that has been quantised."""
    weight: Any = module._parameters["weight"]
    if weight is None or not _is_of_bitsandbytes(module, "Linear4bit") or weight.ndim != 2 or weight.shape[1] != 1:
        return None
    # unpickled or converted, the weight is a plain parameter, and the module has the state
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None or len(state.shape) != 2 or getattr(state, "packing_format_for_cpu", False):
        return None
    return FourBit(module, state)


class FourBit(Quantised):
    """4-bit codes of blocks that share a scale (Dettmers et al. 2023, QLoRA)."""

    library = "bitsandbytes"
    returns_input_dtype = True

    def __init__(self, module: nn.Module, state: Any, weight: Any = None) -> None:
        super().__init__(module)
        self._state = state
        self._weight: Any = module.weight if weight is None else weight
        self.kind = state.quant_type
        self.shape = tuple(state.shape)
        self.dtype = state.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        state = self._state
        scales = state.absmax
        if state.nested:
            scales = (dequantize_blockwise(scales, state.state2) + state.offset).float()
        directly = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        codes = self._weight.data.view(-1, 1)
        made: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, scales, state.blocksize, state.quant_type, state.shape, directly
        )
        return made.to(dtype)

    def multiply(self, input: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        # Not the layer's forward, which packs weights anew on some CPUs, and casts a bias in place. On a CPU a weight
        # that is not packed is made dense.
        made: Tensor = matmul_4bit(input, self._weight, quant_state=self._state)
        return made

    def stored(self) -> list[Tensor]:
        state = self._state
        found = [self._weight.data, state.absmax]
        if state.nested:
            found += [state.offset, state.state2.absmax]
        return found

    def requantised(self, dense: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        old = self._weight
        made: Any = Params4bit(
            dense.to(self.dtype),
            requires_grad=False,
            blocksize=self._state.blocksize,
            compress_statistics=self._state.nested,
            quant_type=self.kind,
            quant_storage=old.dtype,
        )
        return made.to(old.device)

    def like(self, parameter: Any) -> Quantised:
        return FourBit(self.module, parameter.quant_state, parameter)

    def compute_dtype(self, input: Tensor) -> torch.dtype:
        own: torch.dtype | None = self.module.compute_dtype
        if self.module.compute_type_is_set and own is not None:
            return own
        return input.dtype  # what Linear4bit would set at its first forward

    def put(self, parameter: nn.Parameter) -> None:
        super().put(parameter)
        state: Any = self.module.weight
        state.module, self.module.quant_state = self.module, state.quant_state


def eight_bit(module: nn.Module) -> Quantised | None:
    """The weight of a ``Linear8bitLt`` that has been quantised."""
    weight: Any = module._parameters["weight"]
    if weight is None or not _is_of_bitsandbytes(module, "Linear8bitLt") or weight.data.dtype is not torch.int8:
        return None
    own = getattr(weight, "SCB", None)  # until the first forward, which moves them; unpickled, it is a plain parameter
    scales: Any = module.state.SCB if own is None else own  # type: ignore[union-attr]
    return None if scales is None else EightBit(module, scales)


class EightBit(Quantised):
    """8-bit integers with a scale for each row (Dettmers et al. 2022, LLM.int8())."""

    library = "bitsandbytes"
    kind = "int8"

    def __init__(self, module: nn.Module, scales: Tensor, weight: Any = None) -> None:
        super().__init__(module)
        self._scales = scales
        self._weight: Any = module.weight if weight is None else weight
        self.shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        self.dtype = torch.float16

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._weight.data.to(dtype).mul_(self._scales.unsqueeze(1).mul(1 / 127))

    def multiply(self, input: Tensor) -> Tensor:
        from bitsandbytes import matmul

        if self.module.weight.CB is not None:
            self.module.init_8bit_state()
        state = self.module.state
        state.is_training = False
        made: Tensor = matmul(input, self._weight, state=state)
        return made

    def stored(self) -> list[Tensor]:
        return [self._weight.data, self._scales]

    def requantised(self, dense: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        made = Int8Params(dense.cpu(), requires_grad=False, has_fp16_weights=False)
        return made._quantize(self.device)

    def like(self, parameter: Any) -> Quantised:
        return EightBit(self.module, parameter.SCB, parameter)

    def put(self, parameter: nn.Parameter) -> None:
        super().put(parameter)
        self.module.state.reset_grads()
        self.module.state.CB = self.module.state.SCB = None
