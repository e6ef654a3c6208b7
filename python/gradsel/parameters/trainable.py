"""Which tensors can be ranked and trained: plain, dense ones of a floating-point dtype, in memory here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradsel.sharding import is_sharded, local_of

#: float8 and smaller have no arithmetic in torch.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_untrainable(parameter: Tensor, sharded: bool = False) -> str | None:
    """Why no entries of a parameter can be ranked or trained, in a few words; None if they can.

    Args:
        sharded: what is asked for can be done with the shards of a DTensor.
    """
    if sharded and is_sharded(parameter):
        partial = any(placement.is_partial() for placement in getattr(parameter, "placements", ()))
        return "a DTensor of partial sums" if partial else why_untrainable(local_of(parameter))
    kind = type(parameter.data if type(parameter) is nn.Parameter else parameter)
    if nn.parameter.is_lazy(parameter):
        return "not initialised"
    if is_sharded(parameter):
        return "a DTensor, sharded by FSDP or tensor parallelism"
    if hasattr(parameter, "quant_state") or hasattr(parameter, "CB") or _is_wrapper(parameter):
        return f"quantised or wrapped ({kind.__name__})"
    if parameter.dtype not in _DTYPES:
        return str(parameter.dtype).removeprefix("torch.")
    if parameter.layout is not torch.strided:
        return str(parameter.layout).removeprefix("torch.")
    if parameter.is_nested:
        return "nested"
    return None


def _is_wrapper(parameter: Tensor) -> bool:
    """Whether it is a tensor made of others, as those of torchao are."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(parameter)


def has_memory(parameter: Tensor) -> bool:
    """Whether its entries can be looked at: it is strided, here, and not made of other tensors."""
    wrapped = _is_wrapper(parameter) or is_sharded(parameter) or nn.parameter.is_lazy(parameter)
    return not wrapped and parameter.layout is torch.strided and not parameter.is_nested and not parameter.is_meta


def is_reduced(parameter: Tensor, short: str) -> bool:
    """Whether an untrainable parameter stands for a weight that could be trained: it is quantised or sharded."""
    integers = parameter.dtype in (torch.uint8, torch.int8) and short.endswith(("weight", "proj"))
    small = integers or (parameter.is_floating_point() and parameter.dtype not in _DTYPES)
    stored = hasattr(parameter, "quant_state") or hasattr(parameter, "CB")  # of bitsandbytes, in any dtype
    return small or stored or _is_wrapper(parameter) or is_sharded(parameter)


def require_trainable(name: str, parameter: Tensor, hint: str | None = None) -> None:
    """
    Args:
        hint: what else to do about such a parameter.

    Raises:
        ValueError: entries of this parameter cannot be trained.
    """
    reason = why_untrainable(parameter, sharded=True)
    if reason is not None:
        first = "" if hint is None else f"{hint}; or "
        raise ValueError(
            f"{name} is {reason}, which cannot be trained; {first}freeze it, as in select(freeze=[{name!r}])"
        )
    if parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device, where it has no entries: it is not loaded, or offloaded by accelerate; "
            "load the whole model first"
        )
    if parameter.is_inference():
        raise ValueError(
            f"{name} was made in torch.inference_mode(), where torch makes tensors that cannot be trained: make the "
            "model outside of it"
        )
