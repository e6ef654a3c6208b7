"""A call of ``masked_adam_`` that a training loop repeats, described once.

Finding and checking the tensors of a step takes longer than updating the entries of a small selection. So the call is
described to C++ once: every tensor, and every entry of a dict or list by which it was found. Before the call is
repeated, one pass over this description tells whether anything has changed but gradients and hyperparameters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsel_kernels import _adam_checks as checks
from gradsel_kernels import backends
from gradsel_kernels.adam import operands
from gradsel_kernels.adam_call import AdamOptions, records
from gradsel_kernels.adam_item import ITEM_WORDS, WORD_OF
from gradsel_kernels.adam_table import table_of
from gradsel_kernels.backends import native


class Source(NamedTuple):
    """Where the gradient of one tensor comes from in every step.

    Attributes:
        parameter: its ``grad`` is.
        convert: makes the kernel's gradient of it; None if it is one already, or a view of it.
    """

    parameter: Tensor
    convert: Callable[[Tensor], Tensor] | None = None


class Written(NamedTuple):
    """A tensor that every step writes.

    Attributes:
        tensor: its version goes up by one, as after every write in place.
        noted: a list with its version at ``at``, or a dict with (version, address) under the tensor, which are kept up
            to date. If the tensor is in another version, somebody else has written it, and the call cannot be repeated.
            None: it may be written by anybody.
    """

    tensor: Tensor
    noted: list | dict | None = None
    at: int = 0


class RepeatedAdam:
    """One call of :func:`gradsel_kernels.masked_adam_`, after it has been made once.

    Args:
        lists: its arguments that are lists.
        sources: of the gradients in them.
        links: entries of dicts that have to stay the same objects: (dict, key, object).
        fixed: lists that have to hold the objects that they hold.
        without_grad: parameters whose ``grad`` has to stay None.
        written: what the call writes.

    Raises:
        TypeError, RuntimeError, ValueError: the call cannot be described: tensors without memory or versions.
    """

    def __init__(
        self,
        lists: Mapping[str, Any],
        sources: Sequence[Source],
        links: Iterable[tuple[dict, Any, Any]],
        fixed: Iterable[list],
        without_grad: Iterable[Tensor],
        written: Iterable[Written],
    ) -> None:
        _use_torch()
        tensors, keywords = operands(**lists)
        options: dict[str, Any] = dict.fromkeys(AdamOptions._fields)
        call, _ = records(*tensors, **keywords, **options)
        self._table = table_of(call)
        self._sources = [(i, s.parameter, s.convert) for i, s in enumerate(sources) if s.convert is not None]
        self._converted: list[Tensor] = []
        self._watch = watch = native.module().Watch()
        for link in links:
            watch.link(*link)
        for objects in fixed:
            watch.list(objects)
        for parameter in without_grad:
            watch.without_grad(parameter)
        for each in written:
            watch.written(*each)
        for tensor in _held((*call.weights, *call.values)):
            watch.parameter(tensor)
        for tensor in _held(call.states()):
            watch.state(tensor)
        for i, (source, grad) in enumerate(zip(sources, call.grads, strict=True)):
            word, offset = 0, 0
            if source.convert is None:
                word = self._table.address + 8 * (i * ITEM_WORDS + WORD_OF["grad"])
                assert source.parameter.grad is not None
                offset = grad.data_ptr() - source.parameter.grad.data_ptr()
            watch.grad(source.parameter, word, offset)
        self._call = call._replace(grads=[])  # gradients of one step must not live on
        self.device = call.exp_avgs[0].device

    def holds(self) -> bool:
        """Whether nothing has changed except gradients and hyperparameters. Reads the gradients."""
        if not self._watch.holds():
            return False
        if self._sources:
            self._convert()
        return True

    @torch.no_grad()
    def _convert(self) -> None:
        self._converted = []
        with torch._C.DisableTorchFunctionSubclass():
            for i, parameter, convert in self._sources:
                assert parameter.grad is not None
                self._converted.append(convert(parameter.grad))
                self._table.items[i].grad = self._converted[-1].data_ptr()

    def run(
        self,
        options: AdamOptions,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        rates: Tensor | None = None,
    ) -> None:
        """Makes the call. To be called only after :meth:`holds`, before anything else happens.

        Args:
            options: the hyperparameters.
            grad_scale, found_inf, rates: as in :func:`gradsel_kernels.masked_adam_`.

        Raises:
            ValueError: ``grad_scale``, ``found_inf`` or ``rates`` do not fit.
            IndexError: as :func:`gradsel_kernels.masked_adam_`. Nothing has changed.
        """
        call = self._call
        if grad_scale is not None or found_inf is not None or rates is not None:
            call = call._replace(grad_scale=grad_scale, found_inf=found_inf, rates=rates)
            checks.scaler(call)
        backends.resolve(self.device).adam_of_table(self._table, call, options)
        self._converted = []
        self._watch.done()


def _held(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once: the empty one that stands for all that a call does without would be there many times."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def can_repeat(device: torch.device) -> bool:
    """Whether calls on a device can be repeated without the dispatcher, which modes such as profilers listen to."""
    return (
        native.broken is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and hasattr(backends.resolve(device), "adam_of_table")
    )


@cache
def _use_torch() -> None:
    native.module().use_torch(torch._C.TensorBase, torch._C._increment_version, torch_functions())


def torch_functions() -> dict[str, int]:
    """Addresses of the functions by which C++ reads tensors: torch 2.14 and newer export them. Otherwise nothing."""
    try:
        torch_cpu = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))))
        functions = {name: ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in native.module().shims()}
    except (OSError, AttributeError, StopIteration):
        return {}
    return {name: function.value or 0 for name, function in functions.items()}
