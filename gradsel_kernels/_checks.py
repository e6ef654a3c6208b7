"""Argument checks, one per operator, run before any backend sees a tensor.

They look at dtypes, shapes, strides and devices only, never at values, so that they cost no synchronisation and hold
for fake tensors too. Indices out of range are found by the backends (see :mod:`gradsel_kernels.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

WORD = 32
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRATEGIES = ("auto", "union", "gather", "tile")
_INDEX_LIMIT = 2**31


class Layout(IntEnum):
    """How the selected entries of one tensor are written down; ``rows`` and ``cols`` are those of the neuron view."""

    ALL = 0  #: every entry; the index tensor is empty
    COLS = 1  #: int32 [rows, k], the columns of each row
    BITS = 2  #: int32 [rows, ceil(cols / 32)], the packed bitmask
    FLAT = 3  #: int32 or int64 [nnz], row * cols + column


def words(n: int) -> int:
    """Number of 32-bit words that hold ``n`` bits."""
    return (n + WORD - 1) // WORD


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got a sparse one ({tensor.layout}); call .to_dense() first")


def _matrix(name: str, tensor: Tensor, what: str) -> None:
    _dense(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must be a 2-D {what}, got {_describe(tensor)}; view it as [neurons, inputs], "
            f"for example weight.flatten(1)"
        )
    if tensor.shape[1] >= _INDEX_LIMIT:
        raise ValueError(f"{name} has {tensor.shape[1]} columns; column numbers are int32, so at most 2**31 - 1")


def _floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        extra = "; complex tensors are not supported" if tensor.dtype.is_complex else ""
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}{extra}")


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def _same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}; move one of them")


def _no_overlap(name: str, tensor: Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} is written in place but is an expanded view (stride 0); pass the tensor itself")


def topk_rows(grad: Tensor, k: int) -> None:
    _matrix("grad", grad, "neuron view [rows, cols]")
    _floating("grad", grad)
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


def bits_to_cols(bits: Tensor, k: int) -> None:
    _matrix("bits", bits, "packed bitmask [rows, words]")
    _dtype("bits", bits, torch.int32)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")


def gather_rows(weight: Tensor, cols: Tensor) -> None:
    _matrix("weight", weight, "neuron view [rows, cols]")
    _floating("weight", weight)
    _matrix("cols", cols, "tensor of columns [rows, k]")
    _dtype("cols", cols, torch.int32)
    _same_device("cols", cols, "weight", weight)
    if cols.shape[0] != weight.shape[0]:
        raise ValueError(
            f"cols has {cols.shape[0]} rows, but weight has {weight.shape[0]}; one row of columns a neuron"
        )


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    gather_rows(weight, cols)
    _no_overlap("weight", weight)
    _floating("values", values)
    _same_device("values", values, "weight", weight)
    if values.shape != cols.shape:
        raise ValueError(f"values must have the shape of cols {list(cols.shape)}, got {list(values.shape)}")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are taken and returned, and in which Adam computes."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _activations(name: str, tensor: Tensor, features: str) -> None:
    _dense(name, tensor)
    if tensor.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be [tokens, {features}] or [batch, tokens, {features}], got {_describe(tensor)}; "
            f"flatten(0, -2) makes it so"
        )
    _floating(name, tensor)


def take_columns(input: Tensor, columns: Tensor) -> None:
    _activations("input", input, "features")
    if columns.ndim != 1 or columns.dtype is not torch.int32:
        raise ValueError(f"columns must be int32 [count], got {_describe(columns)}")
    _same_device("columns", columns, "input", input)


def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> None:
    _activations("grad_output", grad_output, "rows")
    _activations("input", input, "features")
    if input.dtype is not grad_output.dtype:
        raise TypeError(f"input is {input.dtype}, but grad_output is {grad_output.dtype}; cast one of them")
    _same_device("input", input, "grad_output", grad_output)
    if input.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"input {list(input.shape)} and grad_output {list(grad_output.shape)} must have the same tokens: "
            "every dimension but the last is equal"
        )
    rows = grad_output.shape[-1]
    _dtype("cols", cols, torch.int32)
    _same_device("cols", cols, "grad_output", grad_output)
    if row_offsets is None:
        _matrix("cols", cols, "tensor of columns [rows, k]")
        if cols.shape[0] != rows:
            raise ValueError(
                f"cols has {cols.shape[0]} rows, but grad_output has {rows} features; one row of columns a neuron"
            )
    else:
        if cols.ndim != 1:
            raise ValueError(f"with row_offsets, cols must be [nnz], got {_describe(cols)}")
        if row_offsets.dtype is not torch.int64 or row_offsets.shape != (rows + 1,):
            raise ValueError(f"row_offsets must be int64 [{rows + 1}] (rows + 1), got {_describe(row_offsets)}")
        _same_device("row_offsets", row_offsets, "grad_output", grad_output)
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")


def masked_adam_(
    weights: list[Tensor],
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    originals: list[Tensor],
    steps: list[Tensor],
    indices: list[Tensor],
    layouts: list[int],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    stochastic: Sequence[bool] = (),
    compensations: Sequence[Tensor] | None = None,
    **hyperparameters: float,
) -> None:
    count = len(weights)
    compensations = compensations or ()
    for name, tensors in (
        ("grads", grads),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
        ("steps", steps),
        ("indices", indices),
        ("layouts", layouts),
    ):
        if len(tensors) != count:
            raise ValueError(f"{name} has {len(tensors)} entries, but weights has {count}; pass one for each tensor")
    for name, optional in (
        ("values", values),
        ("max_exp_avg_sqs", max_exp_avg_sqs),
        ("originals", originals),
        ("seeds", seeds),
        ("compensations", compensations),
    ):
        if optional and len(optional) != count:
            raise ValueError(f"{name} has {len(optional)} entries; pass none, or one for each of the {count} weights")
    if len(set(map(id, steps))) < count:
        raise ValueError("two tensors have the same step; each counts its own, so pass a tensor of its own for each")
    if len(stochastic) != len(seeds):
        raise ValueError(f"stochastic has {len(stochastic)} entries, but seeds has {len(seeds)}; one says which hold")
    for i in range(count):
        try:
            _adam_item(
                weights[i],
                values[i] if values else None,
                grads[i],
                exp_avgs[i],
                exp_avg_sqs[i],
                max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
                originals[i] if originals else None,
                steps[i],
                indices[i],
                layouts[i],
            )
            _adam_rounding(
                weights[i],
                values[i] if values else None,
                exp_avgs[i],
                bool(stochastic) and stochastic[i],
                compensations[i] if compensations else None,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"tensor {i}: {error}") from None
    if count:
        adam_scalars(grad_scale, found_inf, exp_avgs[0].device)


def adam_scalars(grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> None:
    """Checks what a gradient scaler passes to masked_adam_."""
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is None:
            continue
        if scalar.numel() != 1 or scalar.dtype is not torch.float32 or scalar.device != device:
            raise ValueError(f"{name} must be one float32 on {device}, got {_describe(scalar)}")


def adam_seeds(seeds: Sequence[int | None]) -> tuple[list[int], list[bool]]:
    """The seeds as the operator takes them: a number for each tensor, and whether it holds."""
    for i, seed in enumerate(seeds):
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"tensor {i}: seed must be an int64, -2**63 to 2**63 - 1, or None, got {seed}")
    return [seed or 0 for seed in seeds], [seed is not None for seed in seeds]


def _adam_item(
    weight: Tensor,
    value: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    original: Tensor | None,
    step: Tensor,
    index: Tensor,
    layout: int,
) -> None:
    shape = exp_avg.shape
    dtype = exp_avg.dtype
    nnz = exp_avg.numel()
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"exp_avg must be float32 or bfloat16 (float64 for float64 weights), got {dtype}")
    for name, tensor, expected in (
        ("exp_avg_sq", exp_avg_sq, dtype),
        ("max_exp_avg_sq", max_exp_avg_sq, dtype),
        ("original", original, sum_dtype(dtype)),
        ("values", value, sum_dtype(dtype)),
    ):
        if tensor is not None and (name != "values" or tensor.numel()):
            _in_mask_order(name, tensor, expected, exp_avg)
    if not exp_avg.is_contiguous():
        raise ValueError(f"exp_avg must be contiguous, got strides {exp_avg.stride()}")
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64) or step.device != exp_avg.device:
        raise ValueError(f"step must be one float on {exp_avg.device}, got {_describe(step)}")

    rows, cols = _adam_layout(index, layout, shape, nnz)
    if layout != Layout.ALL:
        _same_device("indices", index, "exp_avg", exp_avg)
    compact = value is not None and value.numel() != 0
    if weight.numel() != 0:
        if weight.dtype not in FLOATS or (weight.dtype is torch.float64 and dtype is not torch.float64):
            raise TypeError(f"weight is {weight.dtype}, which a state of {dtype} cannot train")
        _same_device("weight", weight, "exp_avg", exp_avg)
        _no_overlap("weight", weight)
        _dense_view("weight", weight, layout, rows, cols, nnz)
    elif nnz == 0:
        return  # nothing selected: the step is counted, nothing else is looked at
    elif not compact:
        raise ValueError("there are neither values nor a weight to update; pass one of them")
    elif grad.shape != shape:
        raise ValueError(f"without a weight the gradient must be compact {list(shape)}, got {list(grad.shape)}")

    if grad.layout is not torch.strided:
        raise TypeError(f"grad must be dense, got {grad.layout}; Adam does not support sparse gradients")
    _floating("grad", grad)
    _same_device("grad", grad, "exp_avg", exp_avg)
    if grad_is_dense(grad, weight):
        _dense_view("grad", grad, layout, rows, cols, nnz)
    elif grad.shape == shape:
        if not grad.is_contiguous():
            raise ValueError(f"a compact grad must be contiguous, got strides {grad.stride()}")
    else:
        raise ValueError(
            f"grad must be dense with the shape of the weight {list(weight.shape)} or compact {list(shape)}, "
            f"got {list(grad.shape)}"
        )


def _in_mask_order(name: str, tensor: Tensor, dtype: torch.dtype, exp_avg: Tensor) -> None:
    if tensor.dtype is not dtype or tensor.shape != exp_avg.shape:
        raise ValueError(
            f"{name} must match exp_avg ({dtype} {list(exp_avg.shape)}), got {_describe(tensor)}"
            + f"; exp_avg is {exp_avg.dtype}" * (exp_avg.dtype is not dtype)
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    _same_device(name, tensor, "exp_avg", exp_avg)


def _adam_rounding(
    weight: Tensor, value: Tensor | None, exp_avg: Tensor, stochastic: bool, compensation: Tensor | None
) -> None:
    """Stochastic rounding and compensation: for weights that hold less than their update has."""
    compensated = compensation is not None and compensation.numel() != 0
    if not (stochastic or compensated) or not (weight.numel() or exp_avg.numel()):
        return
    if stochastic and compensated:
        raise ValueError("it has a seed and a compensation; round stochastically or compensate, not both")
    name = "a seed" if stochastic else "a compensation"
    if weight.numel() == 0:
        raise ValueError(f"{name} needs a weight to round, got none")
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name} needs a bfloat16 or float16 weight, got {weight.dtype}, which loses nothing to it")
    if value is not None and value.numel():
        raise ValueError(f"{name} is for a weight without values, which hold what rounding loses; drop one of them")
    if exp_avg.dtype is torch.float64:
        raise TypeError(f"{name} needs moments in float32 or bfloat16, got {exp_avg.dtype}")
    if compensation is not None and compensated:
        _in_mask_order("compensation", compensation, weight.dtype, exp_avg)


def grad_is_dense(grad: Tensor, weight: Tensor) -> bool:
    """Whether a gradient of masked_adam_ is dense: it has the weight's shape. If not, it lies in mask order."""
    return grad.shape == weight.shape


def _adam_layout(index: Tensor, layout: int, shape: torch.Size, nnz: int) -> tuple[int | None, int | None]:
    """Checks the index tensor of one layout; returns what it says about (rows, words of a row)."""
    if layout == Layout.ALL:
        return None, None
    if not index.is_contiguous():
        raise ValueError(f"indices must be contiguous, got strides {index.stride()}")
    if layout == Layout.FLAT:
        if index.dtype not in (torch.int32, torch.int64) or index.numel() != nnz:
            raise ValueError(f"flat indices must be {nnz} int32 or int64 (the size of exp_avg), got {_describe(index)}")
        return None, None
    if layout not in (Layout.COLS, Layout.BITS):
        raise ValueError(f"unknown layout {layout}; layouts are {', '.join(f'{x.value} ({x.name})' for x in Layout)}")
    if index.dtype is not torch.int32 or index.ndim != 2:
        raise ValueError(f"indices must be int32 [rows, k] (COLS) or [rows, words] (BITS), got {_describe(index)}")
    if layout == Layout.COLS and index.shape != shape:
        raise ValueError(f"columns must have the shape of exp_avg {list(shape)}, got {list(index.shape)}")
    return index.shape[0], index.shape[1] if layout == Layout.BITS else None


def _dense_view(name: str, tensor: Tensor, layout: int, rows: int | None, row_words: int | None, nnz: int) -> None:
    """A dense tensor is contiguous, whatever its shape, or any 2-D view; the mask must fit its rows."""
    if tensor.ndim > 2 and not tensor.is_contiguous():
        raise ValueError(f"{name} has {tensor.ndim} dimensions and strides {tensor.stride()}; pass a 2-D view of it")
    if layout == Layout.ALL and tensor.numel() != nnz:
        raise ValueError(f"{name} has {tensor.numel()} entries, but exp_avg has {nnz}; without a mask they are equal")
    if rows is None:
        return
    if (tensor.shape[0] if tensor.ndim == 2 else rows) != rows or (rows and tensor.numel() % rows):
        raise ValueError(f"the mask is for {rows} rows, but {name} is {list(tensor.shape)}")
    if row_words is not None and rows and words(tensor.numel() // rows) != row_words:
        raise ValueError(
            f"the mask has {row_words} words a row, but {name} has {tensor.numel() // rows} columns, "
            f"which need {words(tensor.numel() // rows)}"
        )
