"""One call of ``topk_masked_adam_`` as every backend takes it: the records of ``masked_adam_``, and packed masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradsel_kernels import _adam_checks, _checks
from gradsel_kernels._checks import Layout, describe
from gradsel_kernels.adam_call import AdamCall, AdamOptions, records


def first_step_records(*lists: Any, **keywords: Any) -> tuple[AdamCall, AdamOptions, list[Tensor]]:
    """The records of a call whose arguments are the operator's, and its packed masks (none if it makes none).

    ``call.indices`` are the columns, which the operator writes, as it does everything but the gradients.
    """
    *others, cols, bits = lists
    call, options = records(*others, cols, [int(Layout.COLS)] * len(cols), **keywords)
    return call, options, bits


def check(call: AdamCall, bits: list[Tensor]) -> None:
    """Raises TypeError or ValueError for tensors that do not fit together."""
    _adam_checks.masked_adam_(call)
    if bits and len(bits) != len(call.weights):
        raise ValueError(f"bits has {len(bits)} entries; pass none, or one for each of the {len(call.weights)} weights")
    for i, (weight, grad, cols) in enumerate(zip(call.weights, call.grads, call.indices, strict=True)):
        try:
            _checks.topk_rows(grad, 1)
            if grad.shape != weight.shape:
                raise ValueError(f"grad must have the shape of the weight {list(weight.shape)}, got {list(grad.shape)}")
            rows, n = grad.shape
            if cols.shape[0] != rows or cols.shape[1] > n:
                raise ValueError(f"cols must be [{rows}, at most {n}], got {list(cols.shape)}")
            shape = (rows, _checks.words(n))
            if bits and (bits[i].shape != shape or not bits[i].is_contiguous() or bits[i].dtype != cols.dtype):
                raise ValueError(f"bits must be contiguous int32 {list(shape)}, got {describe(bits[i])}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"tensor {i}: {error}") from None
