"""The kernels in Triton: for CUDA tensors, and for CPU tensors in a process where Triton's interpreter is on."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton

    from gradsel_kernels.triton import adam, bitmask, rows, topk
    from gradsel_kernels.triton.common import INTERPRETED

    _missing = None
except ImportError as error:
    _missing = str(error)

DEVICES = ("cuda",)


def why_off(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, in words for the user; None if it can."""
    if _missing is not None:
        return f"Triton cannot be imported ({_missing}); install it with: pip install 'triton>=3.6'."
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device."
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA tensors, not on {device.type} tensors."
    if device.type == "cuda" and INTERPRETED:
        return (
            "TRITON_INTERPRET=1 is set, and Triton's interpreter runs on CPU tensors only here. "
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


def pack_bits(mask: Tensor) -> Tensor:
    return bitmask.pack_bits(mask)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    return bitmask.unpack_bits(bits, n)


def bits_to_cols(bits: Tensor, k: int) -> Tensor:
    return bitmask.bits_to_cols(bits, k)


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    return rows.gather_rows(weight, cols)


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    rows.scatter_rows_(weight, cols, values)


def masked_adam_(
    weights: list[Tensor],
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    indices: list[Tensor],
    layouts: list[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    adam.masked_adam_(
        weights,
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        indices,
        layouts,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
