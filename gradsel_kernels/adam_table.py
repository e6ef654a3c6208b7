"""The table of :class:`AdamItem` that a call of ``masked_adam_`` hands to C++ and the GPU, kept for the next call.

A training loop repeats the call with the same tensors and new gradients. Checking 50 tensors and collecting their
addresses, sizes and strides takes longer than updating them, so the table lives as long as the first moment of its
first tensor, and is used again when only the addresses of gradients have changed.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsel_kernels import _adam_checks as checks
from gradsel_kernels._checks import Layout
from gradsel_kernels.adam_call import AdamCall, grad_is_dense, neuron_view
from gradsel_kernels.adam_item import CODES, ITEM_WORDS, WORD_OF, AdamItem

# Plain integers: comparing enum members is slow enough to show.
_COLS = int(Layout.COLS)
_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
#: Most preparations that a table keeps.
PREPARED = 4


class AdamTable:
    """One AdamItem for each tensor of a call.

    Attributes:
        words: the items as int64 numbers, one item after the other.
        items: the same memory as structs.
        address: of that memory.
    """

    def __init__(self, call: AdamCall) -> None:
        count = len(call.weights)
        self.words = array("q", bytes(count * ctypes.sizeof(AdamItem)))
        self.items = (AdamItem * count).from_buffer(self.words)
        for i in range(count):
            self.items[i] = _item(call, i)
        self.address = self.words.buffer_info()[0]
        self._grads = memoryview(self.words)[WORD_OF["grad"] :: ITEM_WORDS]
        self._prepared: list[tuple[Hashable, Any]] = []
        # What the table was made from. The first moment is left out: it is the key that keeps the table alive.
        self._tensors = _lasting(call)
        self._memory = _memory([call.exp_avgs[0], *self._tensors])
        self._numbers = _numbers(call)
        self._forms = _forms(call.weights), _forms(call.grads)

    def renew(self, call: AdamCall) -> bool:
        """Takes over the gradients' addresses if nothing else is new in this call; otherwise returns False."""
        if _numbers(call) != self._numbers or any(grad.layout is not torch.strided for grad in call.grads):
            return False
        tensors = _lasting(call)
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            return False
        # A tensor can stay while its memory changes (.data, set_, resize_); weights can be restrided, too.
        if _memory([call.exp_avgs[0], *tensors]) != self._memory:
            return False
        if (_forms(call.weights), _forms(call.grads)) != self._forms:
            return False
        self._grads[:] = array("q", map(Tensor.data_ptr, call.grads))
        return True

    def prepared(self, key: Hashable, prepare: Callable[[], Any]) -> Any:
        """What an earlier call prepared under this key, such as a copy of the table in device memory, or else anew.

        A key holds the content of the table, so what is found is right even if the allocator has reused an address.
        Few are kept: in a training loop the addresses of gradients recur.
        """
        for known, made in self._prepared:
            if known == key:
                return made
        made = prepare()
        self._prepared[:] = [(key, made), *self._prepared[: PREPARED - 1]]
        return made

    def earlier(self, fits: Callable[[Any], bool]) -> Any:
        """What was prepared last under a key that fits; None if there is none."""
        return next((made for key, made in self._prepared if fits(key)), None)


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def table_of(call: AdamCall) -> AdamTable:
    """The table of an earlier call with the same tensors, renewed; or a new one, after the operator's checks."""
    table: AdamTable | None = _tables.get(call.exp_avgs[0]) if call.exp_avgs else None
    if table is not None and table.renew(call):
        checks.scaler(call)
        return table
    checks.masked_adam_(call)
    table = _tables[call.exp_avgs[0]] = AdamTable(call)
    return table


def _item(call: AdamCall, i: int) -> AdamItem:
    weight, grad, exp_avg, step = call.weights[i], call.grads[i], call.exp_avgs[i], call.steps[i]
    index, layout = call.indices[i], call.layouts[i]
    item = AdamItem(
        layout=layout,
        nnz=exp_avg.numel(),
        weight=weight.data_ptr(),  # 0 without a weight: an empty tensor has no address
        values=_address(call.values, i),
        grad=grad.data_ptr(),
        grad_dtype=CODES[grad.dtype],
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=call.exp_avg_sqs[i].data_ptr(),
        max_exp_avg_sq=_address(call.max_exp_avg_sqs, i),
        original=_address(call.originals, i),
        state_dtype=CODES[exp_avg.dtype],
        step=step.data_ptr(),
        step_dtype=CODES[step.dtype],
        index=index.data_ptr(),
        index_is_64=index.dtype is torch.int64,
        index_width=index.shape[1] if layout == _COLS else 0,
        stochastic=bool(call.stochastic) and call.stochastic[i],
        seed=call.seeds[i] if call.seeds else 0,
        compensation=_address(call.compensations, i),
    )
    if item.weight:
        view = neuron_view(weight, index, layout)
        item.rows, item.cols = view.shape
        item.weight_dtype = CODES[weight.dtype]
        item.weight_row_stride, item.weight_col_stride = view.stride()
        item.grad_is_dense = grad_is_dense(grad, weight)
        if item.grad_is_dense:
            item.grad_row_stride, item.grad_col_stride = neuron_view(grad, index, layout).stride()
    return item


def _address(tensors: Sequence[Tensor], i: int) -> int:
    return tensors[i].data_ptr() if tensors else 0


def _numbers(call: AdamCall) -> tuple:
    """What a table depends on besides tensors: plain numbers, and which of the optional lists there are."""
    optional = bool(call.values), bool(call.max_exp_avg_sqs), bool(call.originals), bool(call.compensations)
    return call.layouts, call.seeds, call.stochastic, optional


def _lasting(call: AdamCall) -> list[Tensor]:
    """All tensors but the gradients and the first moment of the first tensor."""
    return [*call.weights, *call.values, *call.states()[1:]]


# With map, one attribute at a time: a loop takes twice as long, which shows in a small step.


def _memory(tensors: list[Tensor]) -> tuple[list, list]:
    """What changes when a tensor gets other memory. Another dtype at the same address comes with another size, except
    where bits are reinterpreted, which stays in bounds."""
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))


def _forms(tensors: list[Tensor]) -> tuple[list, list, list, list]:
    strides = list(map(Tensor.stride, tensors))
    return list(map(_SHAPE, tensors)), strides, list(map(_DTYPE, tensors)), list(map(_DEVICE, tensors))
