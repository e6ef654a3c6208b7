"""C++ kernels for CPU tensors: allocates outputs and hands addresses, sizes and strides to ``gradsel_kernels._C``.

The extension is built from ``csrc/`` and includes no torch header. If it cannot be loaded, :func:`why_off` says what is
missing and how to get it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from gradsel_kernels import panels
from gradsel_kernels._checks import sum_dtype, words
from gradsel_kernels.adam_call import AdamCall, AdamOptions, read_rates
from gradsel_kernels.adam_item import CODES, ITEM_LAYOUT
from gradsel_kernels.adam_table import AdamTable, table_of

#: Must equal the number compiled into the extension (csrc/bindings.cpp).
ABI = 10

_REBUILD = (
    "Install a C++17 compiler and the Python headers, then install again from the checkout: "
    "pip install --force-reinstall --no-deps ."
)


def _mismatch(module: ModuleType) -> str | None:
    """Why a loaded extension does not fit this Python code; None if it does."""
    found = getattr(module, "ABI", "none")
    if found != ABI:
        return f"the C++ extension gradsel_kernels._C is from another version (ABI {found}, not {ABI}). {_REBUILD}"
    if module.ADAM_ITEM != ITEM_LAYOUT:
        return (
            "the C++ extension gradsel_kernels._C has another AdamItem than gradsel_kernels/adam_item.py (size and "
            f"field offsets {module.ADAM_ITEM}, not {ITEM_LAYOUT}). {_REBUILD}"
        )
    return None


#: Why the extension cannot be used; None if it can.
broken: str | None = None
try:
    _C = importlib.import_module("gradsel_kernels._C")
except ModuleNotFoundError:
    broken = f"the C++ extension gradsel_kernels._C was not built. {_REBUILD}"
except (ImportError, OSError) as error:
    broken = f"the C++ extension gradsel_kernels._C cannot be loaded ({error}). {_REBUILD}"
else:
    broken = _mismatch(_C)

#: "auto" takes "gather" for up to GATHER_SHARE * n + GATHER_COLUMNS entries a row, and "tile" above. Measured with
#: 512 to 6304 tokens, 768 to 8192 rows and n from 48 to 8192 in float32, on two cores of a Zen 4 with AVX-512.
GATHER_SHARE, GATHER_COLUMNS = 0.42, 16


def why_off(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"native kernels run on CPU tensors, and these are on {device}."
    return broken


def module() -> ModuleType:
    """The extension. To be called only where :data:`broken` is None."""
    return _C


def about() -> str:
    openmp = f"OpenMP with {torch.get_num_threads()} threads" if _C.OPENMP else "one thread (built without OpenMP)"
    return f"C++, {_C.simd()} kernels, {openmp}, {_C.COMPILER}"


def topk_rows(grad: Tensor, k: int) -> Tensor:
    return _topk(grad, k, None)


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, n = grad.shape
    bits = torch.empty((rows, words(n)), dtype=torch.int32)
    return _topk(grad, k, bits), bits


def _topk(grad: Tensor, k: int, bits: Tensor | None) -> Tensor:
    rows, n = grad.shape
    k = min(k, n)
    cols = torch.empty((rows, k), dtype=torch.int32)
    _C.topk_rows(
        grad.data_ptr(),
        CODES[grad.dtype],
        rows,
        n,
        *grad.stride(),
        k,
        cols.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        torch.get_num_threads(),
    )
    return cols


def pack_bits(mask: Tensor) -> Tensor:
    rows, n = mask.shape
    bits = torch.empty((rows, words(n)), dtype=torch.int32)
    _C.pack_bits(mask.data_ptr(), rows, n, *mask.stride(), bits.data_ptr(), torch.get_num_threads())
    return bits


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    bits = bits.contiguous()
    rows = bits.shape[0]
    mask = torch.empty((rows, n), dtype=torch.bool)
    _C.unpack_bits(bits.data_ptr(), rows, n, mask.data_ptr(), torch.get_num_threads())
    return mask


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    cols = cols.contiguous()
    values = torch.empty(cols.shape, dtype=weight.dtype)
    found = _C.gather_rows(
        weight.data_ptr(),
        CODES[weight.dtype],
        *weight.shape,
        *weight.stride(),
        cols.data_ptr(),
        cols.shape[1],
        values.data_ptr(),
        torch.get_num_threads(),
    )
    if found is not None:
        raise _range_error("cols", found, weight.shape[1])
    return values


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    cols, values = cols.contiguous(), values.contiguous()
    found = _C.scatter_rows(
        weight.data_ptr(),
        CODES[weight.dtype],
        *weight.shape,
        *weight.stride(),
        cols.data_ptr(),
        cols.shape[1],
        values.data_ptr(),
        CODES[values.dtype],
        torch.get_num_threads(),
    )
    if found is not None:
        raise _range_error("cols", found, weight.shape[1])


def _range_error(name: str, found: tuple[int, int], end: int) -> IndexError:
    return IndexError(f"{name} must lie in 0 to {end - 1}, found {found[0]} to {found[1]}")


def selected_addmm_(output: Tensor, input: Tensor, cols: Tensor, values: Tensor, row_offsets: Tensor | None) -> None:
    cols, values = cols.contiguous(), values.contiguous()
    if row_offsets is not None:
        row_offsets = row_offsets.contiguous()
        _check_offsets(row_offsets, output.shape[1], cols.shape[0])
    found = _C.selected_addmm(
        CODES[output.dtype],
        output.data_ptr(),
        output.shape,
        output.stride(),
        input.data_ptr(),
        input.shape[1],
        input.stride(),
        cols.data_ptr(),
        0 if row_offsets is None else row_offsets.data_ptr(),
        cols.shape[1] if row_offsets is None else 0,
        values.data_ptr(),
        torch.get_num_threads(),
    )
    if found is not None:
        raise _range_error("cols", found, input.shape[1])


def _check_offsets(row_offsets: Tensor, rows: int, nnz: int) -> None:
    if not _C.row_offsets_ascend(row_offsets.data_ptr(), rows, nnz):
        raise IndexError(f"row_offsets must ascend from 0 to {nnz}, the size of cols")


def take_columns(input: Tensor, columns: Tensor) -> Tensor:
    columns = columns.contiguous()
    _check_columns("columns", columns, input.shape[-1])
    *batch, tokens, _ = input.shape
    taken = torch.empty((*batch, columns.shape[0], tokens), dtype=input.dtype)
    _C.take_columns(
        input.data_ptr(),
        CODES[input.dtype],
        *_three(input.stride(), 0),
        *_three(input.shape, 1)[:2],
        columns.data_ptr(),
        columns.shape[0],
        taken.data_ptr(),
        torch.get_num_threads(),
    )
    return taken


def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> Tensor:
    strategy = _strategy(grad_output, input, cols, row_offsets, strategy)
    if strategy == "gather":
        return _gather(grad_output, input, cols, row_offsets, None)
    return getattr(panels, strategy)(grad_output, input, cols, row_offsets)


def selected_weight_grad_bias(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> tuple[Tensor, Tensor]:
    strategy = _strategy(grad_output, input, cols, row_offsets, strategy)
    if strategy == "gather":
        bias = torch.empty(grad_output.shape[-1], dtype=sum_dtype(grad_output.dtype))
        return _gather(grad_output, input, cols, row_offsets, bias), bias
    return getattr(panels, strategy)(grad_output, input, cols, row_offsets), panels.token_sums(grad_output)


def _strategy(grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str) -> str:
    """Checks the indices; then chooses, if that is left to us."""
    n = input.shape[-1]
    _check_columns("cols", cols, n)
    if row_offsets is not None:
        _check_offsets(row_offsets.contiguous(), grad_output.shape[-1], cols.shape[0])
    if strategy != "auto":
        return strategy
    # Both take time in proportion to tokens and rows, so only a row's entries and columns count. "union" is never
    # chosen: so dense a selection uses nearly every column, and its plan costs more than one call saves.
    return "gather" if cols.numel() <= (GATHER_SHARE * n + GATHER_COLUMNS) * grad_output.shape[-1] else "tile"


def _gather(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    cols = cols.contiguous()
    if row_offsets is not None:
        row_offsets = row_offsets.contiguous()
    grad = torch.empty(cols.shape, dtype=sum_dtype(grad_output.dtype))
    _C.selected_weight_grad(
        CODES[grad_output.dtype],
        grad_output.data_ptr(),
        _three(grad_output.shape, 1),
        _three(grad_output.stride(), 0),
        input.data_ptr(),
        input.shape[-1],
        _three(input.stride(), 0),
        cols.data_ptr(),
        0 if row_offsets is None else row_offsets.data_ptr(),
        cols.shape[1] if row_offsets is None else 0,
        grad.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        torch.get_num_threads(),
    )
    return grad


def _three(of_each_dimension: tuple[int, ...], of_no_batch: int) -> tuple[int, ...]:
    """Sizes or strides of (batch, tokens, features)."""
    return of_each_dimension if len(of_each_dimension) == 3 else (of_no_batch, *of_each_dimension)


def _check_columns(name: str, columns: Tensor, end: int) -> None:
    columns = columns.contiguous()
    found = _C.columns_fault(columns.data_ptr(), columns.numel(), end, torch.get_num_threads())
    if found is not None:
        raise _range_error(name, found, end)


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    adam_of_table(table_of(call), call, options)


def adam_of_table(table: AdamTable, call: AdamCall, options: AdamOptions) -> None:
    options = read_rates(call, options)
    if call.found_inf is not None and call.found_inf.item() != 0:
        return
    scale = 1.0 if call.grad_scale is None else call.grad_scale.item()
    fault = _C.masked_adam(table.address, len(call.weights), *options, scale, torch.get_num_threads())
    if fault is None:
        return
    item, low, high, end = fault
    raise _range_error(f"tensor {item}: indices", (low, high), end)


def topk_masked_adam_(call: AdamCall, options: AdamOptions, bits: list[Tensor]) -> None:
    table = AdamTable(call)
    _C.topk_masked_adam(
        table.address,
        len(call.weights),
        [packed.data_ptr() for packed in bits],
        *options,
        1.0 if call.grad_scale is None else call.grad_scale.item(),
        call.found_inf is not None and call.found_inf.item() != 0,
        torch.get_num_threads(),
    )
