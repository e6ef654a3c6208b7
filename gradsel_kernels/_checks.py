"""The checks of an operator's arguments, run before any backend sees a tensor; Adam's are in ``_adam_checks``.

They look at dtypes, shapes, strides and devices but never at values, so they cause no synchronisation and also work on
fake tensors. Indices out of range are found by the backends (see :mod:`gradsel_kernels.reference`).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

WORD = 32
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRATEGIES = ("auto", "union", "gather", "tile")
_INDEX_LIMIT = 2**31


class Layout(IntEnum):
    """The form of one tensor's indices; ``rows`` and ``cols`` are those of its neuron view."""

    ALL = 0  #: every entry; the index tensor is empty
    COLS = 1  #: int32 [rows, k], the columns of each row
    FLAT = 2  #: int32 or int64 [nnz], row * cols + column


def words(n: int) -> int:
    """Number of 32-bit words that hold ``n`` bits."""
    return (n + WORD - 1) // WORD


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got a sparse one ({tensor.layout}); call .to_dense() first")


def _matrix(name: str, tensor: Tensor, what: str) -> None:
    _dense(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must be a 2-D {what}, got {describe(tensor)}; view it as [neurons, inputs], "
            "for example weight.flatten(1)"
        )
    if tensor.shape[1] >= _INDEX_LIMIT:
        raise ValueError(f"{name} has {tensor.shape[1]} columns; column numbers are int32, so at most 2**31 - 1")


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        extra = "; complex tensors are not supported" if tensor.dtype.is_complex else ""
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}{extra}")


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}; move one of them")


def no_overlap(name: str, tensor: Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} is written in place but is an expanded view (stride 0); pass the tensor itself")


def topk_rows(grad: Tensor, k: int) -> None:
    _matrix("grad", grad, "neuron view [rows, cols]")
    floating("grad", grad)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def pack_bits(mask: Tensor) -> None:
    _matrix("mask", mask, "mask [rows, cols]")
    _dtype("mask", mask, torch.bool)


def unpack_bits(bits: Tensor, n: int) -> None:
    _matrix("bits", bits, "packed bitmask [rows, words]")
    _dtype("bits", bits, torch.int32)
    if n < 0 or words(n) != bits.shape[1]:
        raise ValueError(
            f"n = {n} columns need {words(max(n, 0))} words a row, but bits has {bits.shape[1]}: "
            f"it holds {max(0, WORD * (bits.shape[1] - 1) + 1)} to {WORD * bits.shape[1]} columns"
        )


def neuron_matrix(weight: Tensor) -> None:
    _matrix("weight", weight, "neuron view [rows, cols]")
    floating("weight", weight)


def gather_rows(weight: Tensor, cols: Tensor) -> None:
    neuron_matrix(weight)
    _matrix("cols", cols, "tensor of columns [rows, k]")
    _dtype("cols", cols, torch.int32)
    same_device("cols", cols, "weight", weight)
    if cols.shape[0] != weight.shape[0]:
        raise ValueError(
            f"cols has {cols.shape[0]} rows, but weight has {weight.shape[0]}; one row of columns a neuron"
        )


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    gather_rows(weight, cols)
    no_overlap("weight", weight)
    floating("values", values)
    same_device("values", values, "weight", weight)
    if values.shape != cols.shape:
        raise ValueError(f"values must have the shape of cols {list(cols.shape)}, got {list(values.shape)}")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are taken and returned, and in which Adam computes."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _activations(name: str, tensor: Tensor, features: str) -> None:
    _dense(name, tensor)
    if tensor.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be [tokens, {features}] or [batch, tokens, {features}], got {describe(tensor)}; "
            "flatten(0, -2) makes it so"
        )
    floating(name, tensor)


def take_columns(input: Tensor, columns: Tensor) -> None:
    _activations("input", input, "features")
    if columns.ndim != 1 or columns.dtype is not torch.int32:
        raise ValueError(f"columns must be int32 [count], got {describe(columns)}")
    same_device("columns", columns, "input", input)


def selected_addmm_(output: Tensor, input: Tensor, cols: Tensor, values: Tensor, row_offsets: Tensor | None) -> None:
    for name, tensor, features in (("output", output, "rows"), ("input", input, "features")):
        _matrix(name, tensor, f"tensor of activations [tokens, {features}]")
        floating(name, tensor)
    if input.dtype is not output.dtype:
        raise TypeError(f"input is {input.dtype}, but output is {output.dtype}; cast one of them")
    same_device("input", input, "output", output)
    no_overlap("output", output)
    if input.shape[0] != output.shape[0]:
        raise ValueError(f"input {list(input.shape)} and output {list(output.shape)} must have the same tokens")
    _selected_columns(cols, row_offsets, "output", output)
    _dtype("values", values, sum_dtype(output.dtype))
    same_device("values", values, "output", output)
    if values.shape != cols.shape:
        raise ValueError(f"values must have the shape of cols {list(cols.shape)}, got {list(values.shape)}")


def _selected_columns(cols: Tensor, row_offsets: Tensor | None, name: str, activations: Tensor) -> None:
    """``cols`` and ``row_offsets`` fit the features of ``activations``, which are the rows of a weight."""
    rows = activations.shape[-1]
    _dtype("cols", cols, torch.int32)
    same_device("cols", cols, name, activations)
    if row_offsets is None:
        _matrix("cols", cols, "tensor of columns [rows, k]")
        if cols.shape[0] != rows:
            raise ValueError(
                f"cols has {cols.shape[0]} rows, but {name} has {rows} features; one row of columns a neuron"
            )
    else:
        if cols.ndim != 1:
            raise ValueError(f"with row_offsets, cols must be [nnz], got {describe(cols)}")
        if row_offsets.dtype is not torch.int64 or row_offsets.shape != (rows + 1,):
            raise ValueError(f"row_offsets must be int64 [{rows + 1}] (rows + 1), got {describe(row_offsets)}")
        same_device("row_offsets", row_offsets, name, activations)


def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> None:
    _activations("grad_output", grad_output, "rows")
    _activations("input", input, "features")
    if input.dtype is not grad_output.dtype:
        raise TypeError(f"input is {input.dtype}, but grad_output is {grad_output.dtype}; cast one of them")
    same_device("input", input, "grad_output", grad_output)
    if input.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"input {list(input.shape)} and grad_output {list(grad_output.shape)} must have the same tokens: "
            "every dimension but the last is equal"
        )
    _selected_columns(cols, row_offsets, "grad_output", grad_output)
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
