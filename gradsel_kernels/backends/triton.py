"""The Triton kernels: for CUDA tensors, and in a process that uses Triton's interpreter for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton

    from gradsel_kernels.triton import topk
    from gradsel_kernels.triton.adam import adam_of_table, masked_adam_
    from gradsel_kernels.triton.bitmask import pack_bits, unpack_bits
    from gradsel_kernels.triton.common import INTERPRETED
    from gradsel_kernels.triton.product import selected_addmm_
    from gradsel_kernels.triton.rows import gather_rows, scatter_rows_
    from gradsel_kernels.triton.topk_adam import topk_masked_adam_
    from gradsel_kernels.triton.weight_grad import selected_weight_grad, selected_weight_grad_bias, take_columns

    _missing = None
except ImportError as error:
    _missing = str(error)

__all__ = [
    "about",
    "adam_of_table",
    "gather_rows",
    "masked_adam_",
    "pack_bits",
    "scatter_rows_",
    "selected_addmm_",
    "selected_weight_grad",
    "selected_weight_grad_bias",
    "take_columns",
    "topk_masked_adam_",
    "topk_rows",
    "topk_rows_bits",
    "unpack_bits",
    "why_off",
]


def why_off(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, in words for the user; None if it can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device; without one Triton is not used."
    if _missing is not None:
        return f"Triton cannot be imported ({_missing}); install it with: pip install 'triton>=3.6'."
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA tensors, not on {device.type} tensors."
    if device.type == "cuda" and INTERPRETED:
        return (
            "TRITON_INTERPRET=1 is set, and Triton's interpreter is used for CPU tensors only. "
            "Unset it before Python starts."
        )
    if device.type == "cpu" and not INTERPRETED:
        return (
            "Triton compiles for GPUs, and the tensors are on the CPU. To interpret the kernels (slowly, to test them) "
            "set TRITON_INTERPRET=1 in the environment before Python starts."
        )
    return None


def about() -> str:
    return f"triton {triton.__version__}, {'interpreted on the CPU' if INTERPRETED else 'compiled'}"


def topk_rows(grad: Tensor, k: int) -> Tensor:
    return topk.topk(grad, k, with_bits=False)[0]


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cols, bits = topk.topk(grad, k, with_bits=True)
    assert bits is not None
    return cols, bits
