"""The specification as a backend: serves every device that has nothing faster."""

from __future__ import annotations

import torch

from gradsel_kernels.reference import (
    bits_to_cols,
    gather_rows,
    masked_adam_,
    pack_bits,
    scatter_rows_,
    selected_weight_grad,
    selected_weight_grad_bias,
    take_columns,
    topk_rows,
    topk_rows_bits,
    unpack_bits,
)

__all__ = [
    "about",
    "bits_to_cols",
    "gather_rows",
    "masked_adam_",
    "pack_bits",
    "scatter_rows_",
    "selected_weight_grad",
    "selected_weight_grad_bias",
    "take_columns",
    "topk_rows",
    "topk_rows_bits",
    "unpack_bits",
    "why_off",
]


def why_off(device: torch.device) -> str | None:
    return None


def about() -> str:
    return "plain torch, the specification"
