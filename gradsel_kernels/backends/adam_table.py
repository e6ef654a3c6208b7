"""What C++ and CUDA are told about one call of ``masked_adam_``: a table of integers, kept for the next call.

A training loop repeats the call with the same tensors and new gradients. Checking 50 tensors and collecting their
addresses, sizes and strides takes longer than updating them, so the table of the last call is kept for as long as its
first moment lives and used again when nothing but the gradients' addresses is new.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsel_kernels import _checks as checks
from gradsel_kernels._checks import Layout, grad_is_dense

# The dtype codes of csrc/common/numbers.h.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Plain integers: comparing enum members is slow enough to show.
_COLS, _BITS = int(Layout.COLS), int(Layout.BITS)
_DTYPE, _SHAPE, _DEVICE = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")
#: Most preparations that a table keeps.
PREPARED = 4
GRAD, WIDTH = 9, 27  # of AdamItem in csrc/common/adam_item.h: the place of the gradient's address, and fields in all


class AdamTable:
    """One AdamItem of csrc/common/adam_item.h for each tensor of a call; arguments as in the operator's schema."""

    def __init__(
        self,
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
        compensations: list[Tensor],
        seeds: list[int],
        stochastic: list[bool],
    ) -> None:
        self.items = array("q")
        self.count = len(weights)
        self._prepared: list[tuple[Hashable, Any]] = []
        for i, weight in enumerate(weights):
            grad, state, step, index, layout = grads[i], exp_avgs[i], steps[i], indices[i], layouts[i]
            address = weight.data_ptr()  # 0 without a weight: an empty tensor has no address
            rows = cols = weight_row = weight_col = grad_row = grad_col = dense = width = 0
            if layout in (_COLS, _BITS):
                masked_rows, width = index.shape
            else:
                masked_rows = 1
            if address:
                rows, cols, weight_row, weight_col = _rows_of(weight, masked_rows)
                if grad_is_dense(grad, weight):
                    dense = 1
                    _, _, grad_row, grad_col = _rows_of(grad, masked_rows)
            self.items.extend(
                (
                    layout,
                    state.numel(),
                    rows,
                    cols,
                    address,
                    CODES[weight.dtype] if address else 0,
                    weight_row,
                    weight_col,
                    values[i].data_ptr() if values else 0,
                    grad.data_ptr(),
                    CODES[grad.dtype],
                    dense,
                    grad_row,
                    grad_col,
                    state.data_ptr(),
                    exp_avg_sqs[i].data_ptr(),
                    max_exp_avg_sqs[i].data_ptr() if max_exp_avg_sqs else 0,
                    originals[i].data_ptr() if originals else 0,
                    CODES[state.dtype],
                    step.data_ptr(),
                    CODES[step.dtype],
                    index.data_ptr(),
                    index.dtype is torch.int64,
                    width,
                    stochastic[i] if stochastic else 0,
                    seeds[i] if seeds else 0,
                    compensations[i].data_ptr() if compensations else 0,
                )
            )
        # Everything the table was made from. The first moment is left out: it is the key that keeps the table alive.
        self._tensors = _kept(
            weights, values, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, originals, steps, indices, compensations
        )
        self._memory = _memory([exp_avgs[0], *self._tensors])
        self._numbers = list(layouts), list(seeds), list(stochastic)
        # Which of the optional ones it is that lie in _tensors.
        self._optional = bool(values), bool(max_exp_avg_sqs), bool(originals), bool(compensations)
        self._forms = _forms(weights), _forms(grads)

    def takes(
        self,
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
        compensations: list[Tensor],
        seeds: list[int],
        stochastic: list[bool],
    ) -> bool:
        """Whether only the gradients' addresses are new in this call; the table then holds them."""
        if (layouts, seeds, stochastic) != self._numbers or any(grad.layout is not torch.strided for grad in grads):
            return False
        if (bool(values), bool(max_exp_avg_sqs), bool(originals), bool(compensations)) != self._optional:
            return False
        tensors = _kept(
            weights, values, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, originals, steps, indices, compensations
        )
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            return False
        # A tensor can stay and its memory change (.data, set_, resize_); weights can be seen in another way, too.
        if _memory([exp_avgs[0], *tensors]) != self._memory or (_forms(weights), _forms(grads)) != self._forms:
            return False
        for i, grad in enumerate(grads):
            self.items[i * WIDTH + GRAD] = grad.data_ptr()
        return True

    def prepared(self, key: Hashable, prepare: Callable[[], Any]) -> Any:
        """What was prepared for an earlier call with this key, such as a copy of the table in device memory, or is now.

        A key holds the table's content, not just whose addresses are in it, so what is found is right whatever the
        allocator did since. A training loop needs few: the addresses of its gradients recur.
        """
        for known, made in self._prepared:
            if known == key:
                return made
        made = prepare()
        self._prepared[:] = [(key, made), *self._prepared[: PREPARED - 1]]
        return made


def stream_of(device: torch.device) -> int:
    """The current stream of a device; 0 for CPU tensors, on which kernels are interpreted or emulated."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured in a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current one
        return torch.cuda.is_current_stream_capturing()


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def table_of(
    args: tuple[Any, ...],
    seeds: Sequence[int],
    stochastic: Sequence[bool],
    compensations: Sequence[Tensor] | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> AdamTable:
    """The table of an earlier call with the same tensors, with the addresses of these gradients; or a new one, after
    the operator's checks.

    Args:
        args: the operator's positional ones, in its order.
    """
    exp_avgs = args[3]
    described: list[Any] = [*args, list(compensations or ()), list(seeds), list(stochastic)]
    table: AdamTable | None = _tables.get(exp_avgs[0]) if exp_avgs else None
    if table is not None and table.takes(*described):
        checks.adam_scalars(grad_scale, found_inf, exp_avgs[0].device)
        return table
    checks.masked_adam_(
        *args, grad_scale=grad_scale, found_inf=found_inf,
        compensations=compensations, seeds=seeds, stochastic=stochastic,
    )  # fmt: skip
    table = _tables[exp_avgs[0]] = AdamTable(*described)
    return table


def _kept(
    weights: list[Tensor],
    values: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    originals: list[Tensor],
    steps: list[Tensor],
    indices: list[Tensor],
    compensations: list[Tensor],
) -> list[Tensor]:
    moments = [*exp_avgs[1:], *exp_avg_sqs, *max_exp_avg_sqs]
    return [*weights, *values, *moments, *originals, *steps, *indices, *compensations]


# By map and one attribute at a time: a loop of its own takes twice as long, which shows in a small step.


def _memory(tensors: list[Tensor]) -> tuple[list, list]:
    """What tells that a tensor has other memory than before. Other dtypes at the same address have other sizes, but for
    reinterpreted bits, which are in bounds."""
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))


def _forms(tensors: list[Tensor]) -> tuple[list, list, list, list]:
    strides = list(map(Tensor.stride, tensors))
    return list(map(_SHAPE, tensors)), strides, list(map(_DTYPE, tensors)), list(map(_DEVICE, tensors))


def _rows_of(tensor: Tensor, rows: int) -> tuple[int, int, int, int]:
    """Rows, columns and strides of the neuron view of a dense tensor, as in the specification's ``_as_rows``."""
    if tensor.ndim == 2:
        return *tensor.shape, *tensor.stride()
    cols = tensor.numel() // rows
    step = tensor.stride(0) if tensor.ndim == 1 else 1
    return rows, cols, cols * step, step
