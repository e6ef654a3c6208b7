"""CUDA C++ for CUDA tensors: row-wise top-K and masked Adam, from csrc/cuda.

The other operators are Triton's or, without Triton, the specification's. The kernels lie in a fatbin that setup.py
makes where it finds nvcc; ``gradsel_kernels._C`` launches them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsel_kernels._checks import words
from gradsel_kernels.backends import native, reference, triton
from gradsel_kernels.backends.adam_table import AdamTable, is_capturing, stream_of, table_of

FATBIN = Path(__file__).parents[1] / "kernels.fatbin"

_off: str | None = native.broken
if _off is None:
    _C = importlib.import_module("gradsel_kernels._C")
    if FATBIN.exists():
        _C.cuda_load(FATBIN.read_bytes())
    else:
        _off = (
            "the CUDA kernels were not built, because no nvcc was found or it failed. Install the CUDA toolkit (pip "
            "install nvidia-cuda-nvcc), then install again from the checkout: pip install --force-reinstall --no-deps ."
        )

#: masked_adam_ runs the operator's checks itself, and only where a call is not a repetition of an earlier one.
CHECKS_ADAM = True

#: The magnitude, as an integer, that stands for every NaN: infinity's and one.
_NAN = {
    torch.float32: 0x7F800001,
    torch.bfloat16: 0x7F81,
    torch.float16: 0x7C01,
    torch.float64: 0x7FF0000000000001,
}


def why_off(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA tensors, and these are on {device}."
    if _off is not None:
        return _off
    if not torch.cuda.is_available():
        return "torch finds no CUDA device."
    return _C.cuda_why_off(device.index or 0) or None


def about() -> str:
    return "CUDA C++ for top-K and masked Adam, else as Triton"


def topk_rows(grad: Tensor, k: int) -> Tensor:
    return _topk(grad, k, None)


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, n = grad.shape
    bits = torch.empty((rows, words(n)), dtype=torch.int32, device=grad.device)
    return _topk(grad, k, bits), bits


def _topk(grad: Tensor, k: int, bits: Tensor | None) -> Tensor:
    rows, n = grad.shape
    k = min(k, n)
    cols = torch.empty((rows, k), dtype=torch.int32, device=grad.device)
    _C.cuda_topk_rows(
        grad.data_ptr(),
        grad.element_size(),
        _NAN[grad.dtype],
        rows,
        n,
        *grad.stride(),
        k,
        cols.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        grad.device.index or 0,
        stream_of(grad.device),
    )
    return cols


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
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    anchor: float,
    anchor_l1: bool,
    anchor_decoupled: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    stochastic: Sequence[bool] = (),
    compensations: Sequence[Tensor] | None = None,
) -> None:
    """One launch, two more if a mask is packed; float64 states have launches of their own. Never waits for the device.

    Can be captured in a CUDA graph, whose replays read and write the same tensors with the same hyperparameters.
    """
    args = (weights, values, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, originals, steps, indices, layouts)
    table = table_of(args, seeds, stochastic, compensations, grad_scale, found_inf)
    device = exp_avgs[0].device
    number = device.index or 0
    stream = stream_of(device)
    # What a graph captures is written in every replay and must not be found outside it; its memory is the graph's.
    tables = (
        _on_device(table, device, stream)
        if is_capturing(device)
        else table.prepared((stream, table.items.tobytes()), lambda: _on_device(table, device, stream))
    )
    for on_device, count, tiles, float64, has_bits in tables:
        ranks = torch.empty(tiles, dtype=torch.int64, device=device) if has_bits else None
        _C.cuda_masked_adam(
            on_device.data_ptr(),
            count,
            tiles,
            float64,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled_weight_decay,
            maximize,
            anchor,
            anchor_l1,
            anchor_decoupled,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            0 if ranks is None else ranks.data_ptr(),
            number,
            stream,
        )


def _on_device(table: AdamTable, device: torch.device, stream: int) -> list[tuple[Tensor, int, int, bool, bool]]:
    """The table in device memory, what has float64 states apart from the rest: each with the numbers of its tensors and
    tiles, and whether it is the float64 one and has packed masks."""
    written = []
    for float64 in (False, True):
        content, count, tiles, has_bits = _C.cuda_adam_table(table.items.buffer_info()[0], table.count, float64)
        if count:
            memory = torch.empty(len(content) // 8, dtype=torch.int64, device=device)
            _C.cuda_write_table(content, memory.data_ptr(), device.index or 0, stream)
            written.append((memory, count, tiles, float64, has_bits))
    return written


def _borrowed(op: str) -> Callable[..., Any]:
    def call(*args):
        module = reference if triton.why_off(args[0].device) else triton
        return getattr(module, op)(*args)

    return call


bits_to_cols = _borrowed("bits_to_cols")
gather_rows = _borrowed("gather_rows")
pack_bits = _borrowed("pack_bits")
scatter_rows_ = _borrowed("scatter_rows_")
selected_weight_grad = _borrowed("selected_weight_grad")
selected_weight_grad_bias = _borrowed("selected_weight_grad_bias")
take_columns = _borrowed("take_columns")
unpack_bits = _borrowed("unpack_bits")
