"""The specification as a backend, for every device that has nothing faster."""

from __future__ import annotations

import torch

from gradsel_kernels import _adam_checks, reference
from gradsel_kernels.adam_call import AdamCall, AdamOptions, read_rates
from gradsel_kernels.reference import (
    gather_rows,
    pack_bits,
    scatter_rows_,
    selected_addmm_,
    selected_weight_grad,
    selected_weight_grad_bias,
    take_columns,
    topk_masked_adam_,
    topk_rows,
    topk_rows_bits,
    unpack_bits,
)

__all__ = [
    "about",
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
    return None


def about() -> str:
    return "plain torch, the specification"


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    _adam_checks.masked_adam_(call)
    reference.masked_adam_(call, read_rates(call, options))
