"""One tensor of a masked Adam step as C++ and the GPU kernels read it: the struct AdamItem of csrc, field by field."""

from __future__ import annotations

import ctypes

import torch

#: The dtype codes of the C++ enum Dtype.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class AdamItem(ctypes.Structure):
    """Addresses are 0 where a tensor is missing; strides are in elements."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("layout", "nnz", "rows", "cols"),
            *("weight", "weight_dtype", "weight_row_stride", "weight_col_stride"),
            "values",
            *("grad", "grad_dtype", "grad_is_dense", "grad_row_stride", "grad_col_stride"),
            *("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            "original",
            "state_dtype",
            *("step", "step_dtype"),
            *("index", "index_is_64", "index_width"),  # index_width: columns selected in a row (COLS)
            *("stochastic", "seed"),
            "compensation",
        )
    ]


#: Size and field offsets in bytes. The native module exports its own, and both must agree.
ITEM_LAYOUT = ctypes.sizeof(AdamItem), {name: getattr(AdamItem, name).offset for name, *_ in AdamItem._fields_}
_WORD = ctypes.sizeof(ctypes.c_int64)
#: The same in 64-bit words, of which tables consist.
ITEM_WORDS = ITEM_LAYOUT[0] // _WORD
WORD_OF = {name: offset // _WORD for name, offset in ITEM_LAYOUT[1].items()}
