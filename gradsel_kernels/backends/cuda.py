"""CUDA C++ for CUDA tensors: row-wise top-K, masked Adam, and both fused, from csrc/cuda.

The other operators come from Triton or, without Triton, from the specification. The kernels are in a fatbin that
setup.py makes where it finds nvcc; ``gradsel_kernels._C`` launches them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsel_kernels._checks import words
from gradsel_kernels._streams import is_capturing, stream_of
from gradsel_kernels.adam_call import AdamCall, AdamOptions
from gradsel_kernels.adam_item import CODES
from gradsel_kernels.adam_table import AdamTable, table_of
from gradsel_kernels.backends import native, reference, triton

FATBIN = Path(__file__).parents[1] / "kernels.fatbin"

_off: str | None = native.broken
if _off is None:
    _C = importlib.import_module("gradsel_kernels._C")
    if FATBIN.exists():
        _C.cuda_load(FATBIN.read_bytes())
    else:
        _off = (
            "the CUDA kernels were not built, because nvcc was not found or failed. Install the CUDA toolkit (pip "
            "install nvidia-cuda-nvcc), then install again from the checkout: pip install --force-reinstall --no-deps ."
        )


def why_off(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA tensors, and these are on {device}."
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; without one the CUDA kernels are not used."
    if _off is not None:
        return _off
    return _C.cuda_why_off(device.index or 0) or None


def about() -> str:
    return "CUDA C++ for top-K and masked Adam, apart and fused, Triton for the rest"


def topk_rows(grad: Tensor, k: int) -> Tensor:
    return _topk(grad, k, None)


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, n = grad.shape
    bits = torch.empty((rows, words(n)), dtype=torch.int32, device=grad.device)
    return _topk(grad, k, bits), bits


def _topk(grad: Tensor, k: int, bits: Tensor | None) -> Tensor:
    rows, n = grad.shape
    cols = torch.empty((rows, min(k, n)), dtype=torch.int32, device=grad.device)
    _C.cuda_topk_rows(
        grad.data_ptr(),
        CODES[grad.dtype],
        *grad.shape,
        *grad.stride(),
        cols.shape[1],
        cols.data_ptr(),
        _address(bits),
        grad.device.index or 0,
        stream_of(grad.device),
    )
    return cols


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    """One launch; float64 states have their own. Never waits for the device.

    It can be captured in a CUDA graph, whose replays use the same tensors and, but for rates, hyperparameters.
    """
    adam_of_table(table_of(call), call, options)


def adam_of_table(table: AdamTable, call: AdamCall, options: AdamOptions) -> None:
    device = call.exp_avgs[0].device
    stream = stream_of(device)
    # What a graph captures is written again in every replay, so it belongs to the graph and must not be found outside.
    tables = (
        _written(table, device, stream)
        if is_capturing(device)
        else table.prepared((stream, table.words.tobytes()), lambda: _written(table, device, stream))
    )
    for memory, count, tiles, float64 in tables:
        _C.cuda_masked_adam(
            memory.data_ptr(),
            count,
            tiles,
            float64,
            *options,
            _address(call.grad_scale),
            _address(call.found_inf),
            _address(call.rates),
            device.index or 0,
            stream,
        )


def topk_masked_adam_(call: AdamCall, options: AdamOptions, bits: list[Tensor]) -> None:
    """One launch for all tensors whose gradients have elements of one size, and whose K is 1, or up to 64, or more.

    Like :func:`masked_adam_` it never waits for the device, and can be captured.
    """
    device = call.weights[0].device
    index, stream = device.index or 0, stream_of(device)
    table = AdamTable(call)
    launches = _C.cuda_topk_adam_launches(table.address, len(table.items), [b.data_ptr() for b in bits], index)
    for kernel, content, *sizes in launches:
        memory = torch.empty(len(content) // 8, dtype=torch.int64, device=device)
        _C.cuda_write_table(content, memory.data_ptr(), index, stream)
        _C.cuda_topk_adam(
            kernel,
            memory.data_ptr(),
            *sizes,
            *options,
            _address(call.grad_scale),
            _address(call.found_inf),
            index,
            stream,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _written(table: AdamTable, device: torch.device, stream: int) -> list[tuple[Tensor, int, int, bool]]:
    """The table in device memory, in one part for float64 states and one for the others.

    Each part comes with its numbers of tensors and tiles, and whether its states are float64.
    """
    parts = []
    for float64 in (False, True):
        content, count, tiles = _C.cuda_adam_table(table.address, len(table.items), float64)
        if count:
            memory = torch.empty(len(content) // 8, dtype=torch.int64, device=device)
            _C.cuda_write_table(content, memory.data_ptr(), device.index or 0, stream)
            parts.append((memory, count, tiles, float64))
    return parts


def _borrowed(op: str) -> Callable[..., Any]:
    def call(*args):
        module = reference if triton.why_off(args[0].device) else triton
        return getattr(module, op)(*args)

    return call


gather_rows = _borrowed("gather_rows")
pack_bits = _borrowed("pack_bits")
scatter_rows_ = _borrowed("scatter_rows_")
selected_addmm_ = _borrowed("selected_addmm_")
selected_weight_grad = _borrowed("selected_weight_grad")
selected_weight_grad_bias = _borrowed("selected_weight_grad_bias")
take_columns = _borrowed("take_columns")
unpack_bits = _borrowed("unpack_bits")
