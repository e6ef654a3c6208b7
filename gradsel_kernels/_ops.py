"""The schema and the fake implementation of every operator, and nothing else.

The operators live under ``torch.ops.gradsel_kernels``. The public functions of this package are thin, documented
wrappers around them; the backends in :mod:`gradsel_kernels.backends` do the work. A fake runs the operator's checks
and allocates its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradsel_kernels import _adam_checks, _checks
from gradsel_kernels.adam_call import records
from gradsel_kernels.topk_adam_call import check as check_first_step
from gradsel_kernels.topk_adam_call import first_step_records

NAMESPACE = "gradsel_kernels"
library = torch.library.Library(NAMESPACE, "DEF")
OPS = torch.ops.gradsel_kernels

SCHEMAS = {
    "topk_rows": "(Tensor grad, SymInt k) -> Tensor",
    "topk_rows_bits": "(Tensor grad, SymInt k) -> (Tensor, Tensor)",
    "pack_bits": "(Tensor mask) -> Tensor",
    "unpack_bits": "(Tensor bits, SymInt n) -> Tensor",
    "gather_rows": "(Tensor weight, Tensor cols) -> Tensor",
    "scatter_rows_": "(Tensor(a!) weight, Tensor cols, Tensor values) -> ()",
    "take_columns": "(Tensor input, Tensor columns) -> Tensor",
    "selected_weight_grad": (
        "(Tensor grad_output, Tensor input, Tensor cols, Tensor? row_offsets, str strategy) -> Tensor"
    ),
    "selected_weight_grad_bias": (
        "(Tensor grad_output, Tensor input, Tensor cols, Tensor? row_offsets, str strategy) -> (Tensor, Tensor)"
    ),
    "selected_addmm_": ("(Tensor(a!) output, Tensor input, Tensor cols, Tensor values, Tensor? row_offsets) -> ()"),
    "masked_adam_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
        "Tensor(e!)[] max_exp_avg_sqs, Tensor[] originals, Tensor(f!)[] steps, Tensor[] indices, int[] layouts, *, "
        "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled_weight_decay, "
        "bool maximize, float anchor, bool anchor_l1, bool anchor_decoupled, Tensor? grad_scale=None, "
        "Tensor? found_inf=None, int[] seeds=[], bool[] stochastic=[], Tensor(g!)[]? compensations=None, "
        "Tensor? numbers=None, Tensor? rates=None) -> ()"
    ),
    "topk_masked_adam_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
        "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] originals, Tensor(g!)[] steps, Tensor(h!)[] cols, "
        "Tensor(i!)[] bits, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool decoupled_weight_decay, bool maximize, float anchor, bool anchor_l1, bool anchor_decoupled, "
        "Tensor? grad_scale=None, Tensor? found_inf=None, int[] seeds=[], bool[] stochastic=[], "
        "Tensor(j!)[]? compensations=None) -> ()"
    ),
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(function):
    torch.library.register_fake(f"{NAMESPACE}::{function.__name__}", function, lib=library)
    return function


@_fake
def topk_rows(grad: Tensor, k: int) -> Tensor:
    _checks.topk_rows(grad, k)
    return grad.new_empty((grad.shape[0], min(k, grad.shape[1])), dtype=torch.int32)


@_fake
def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _checks.topk_rows(grad, k)
    cols = grad.new_empty((grad.shape[0], min(k, grad.shape[1])), dtype=torch.int32)
    return cols, grad.new_empty((grad.shape[0], _checks.words(grad.shape[1])), dtype=torch.int32)


@_fake
def pack_bits(mask: Tensor) -> Tensor:
    _checks.pack_bits(mask)
    return mask.new_empty((mask.shape[0], _checks.words(mask.shape[1])), dtype=torch.int32)


@_fake
def unpack_bits(bits: Tensor, n: int) -> Tensor:
    _checks.unpack_bits(bits, n)
    return bits.new_empty((bits.shape[0], n), dtype=torch.bool)


@_fake
def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    _checks.gather_rows(weight, cols)
    return weight.new_empty(cols.shape)


@_fake
def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    _checks.scatter_rows_(weight, cols, values)


@_fake
def take_columns(input: Tensor, columns: Tensor) -> Tensor:
    _checks.take_columns(input, columns)
    return input.new_empty((*input.shape[:-2], columns.shape[0], input.shape[-2]))


@_fake
def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> Tensor:
    _checks.selected_weight_grad(grad_output, input, cols, row_offsets, strategy)
    return grad_output.new_empty(cols.shape, dtype=_checks.sum_dtype(grad_output.dtype))


@_fake
def selected_weight_grad_bias(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> tuple[Tensor, Tensor]:
    grad = selected_weight_grad(grad_output, input, cols, row_offsets, strategy)
    return grad, grad.new_empty(grad_output.shape[-1])


@_fake
def selected_addmm_(output: Tensor, input: Tensor, cols: Tensor, values: Tensor, row_offsets: Tensor | None) -> None:
    _checks.selected_addmm_(output, input, cols, values, row_offsets)


@_fake
def masked_adam_(*args, numbers: Tensor | None = None, **kwargs) -> None:
    _adam_checks.numbers(numbers)
    _adam_checks.masked_adam_(records(*args, **kwargs)[0])


@_fake
def topk_masked_adam_(*args, **kwargs) -> None:
    call, _, bits = first_step_records(*args, **kwargs)
    check_first_step(call, bits)
