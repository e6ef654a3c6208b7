"""The backends, and how an operator finds one.

A backend is a module with one function for each operator, of the same name and signature, and two more:
``why_off(device)`` says in plain words why the backend cannot run there, and ``about()`` what it uses. Only
``masked_adam_`` differs: it takes the records of :mod:`gradsel_kernels.adam_call`, and runs the operator's checks
itself, because a call that repeats an earlier one need not be checked again.

For every device the torch dispatcher calls the kernels that this file registers. They run the checks, and then the
backend that :func:`use_backend` has forced, or the first in :data:`PREFERRED` that can run there, or the reference.
"""

from __future__ import annotations

import importlib
import platform
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from gradsel_kernels import _checks
from gradsel_kernels._adam_checks import numbers as check_numbers
from gradsel_kernels._ops import NAMESPACE, SCHEMAS, library
from gradsel_kernels._version import __version__
from gradsel_kernels._warnings import user_stacklevel
from gradsel_kernels.adam_call import NUMBERS, records
from gradsel_kernels.topk_adam_call import check as check_first_step
from gradsel_kernels.topk_adam_call import first_step_records

#: The fast backends in order of preference, and the device type for which each is chosen. CUDA C++ comes after Triton
#: until a measurement on a GPU says otherwise.
PREFERRED = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}
NAMES = (*PREFERRED, "reference")

_resolved: dict[torch.device, ModuleType] = {}
_forced: str | None = None
_told: set[str] = set()
_lock = threading.Lock()


def backend(name: str) -> ModuleType:
    """The module of a backend, imported at first use (importing Triton takes half a second)."""
    return importlib.import_module(f"gradsel_kernels.backends.{name}")


def resolve(device: torch.device) -> ModuleType:
    """The backend in use for a device. The answer is remembered until :func:`use_backend` is called."""
    module = _resolved.get(device)
    if module is None:
        module = _resolved[device] = _choose(device)
    return module


def _choose(device: torch.device) -> ModuleType:
    if _forced is not None:
        module = backend(_forced)
        reason = module.why_off(device)
        if reason:
            raise RuntimeError(f"the {_forced} backend was asked for with use_backend, but it cannot run: {reason}")
        return module
    reasons = {}
    for name, device_type in PREFERRED.items():
        if device.type == device_type:
            reason = backend(name).why_off(device)
            if not reason:
                return backend(name)
            reasons[name] = reason
    for name, reason in reasons.items():
        _tell_once(name, reason)
    return backend("reference")


def _tell_once(name: str, reason: str) -> None:
    with _lock:
        if name in _told:
            return
        _told.add(name)
    warnings.warn(
        f"gradsel_kernels runs without its {name} backend: {reason} Plain torch takes its place: the same "
        "selections and, up to rounding, the same updates, but much slower. gradsel_kernels.show_config() says more.",
        RuntimeWarning,
        stacklevel=user_stacklevel(),
    )


class _Forced:
    """What :func:`use_backend` returns: a context manager that restores the previous choice on exit."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _force(self._previous)


def use_backend(name: str | None) -> _Forced:
    """Runs every operation on one backend, for tests and benchmarks.

    Args:
        name: ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``; None (or ``"auto"``) gives the choice back to
            the device.

    The setting takes effect at once and in the whole process, including the threads of the autograd engine. As a
    context manager, it ends with the block. A backend that cannot run says why when an operation is called.
    """
    if name == "auto":
        name = None
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}, or None")
    previous = _forced
    _force(name)
    return _Forced(previous)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _resolved.clear()


_SAME_CHECK = {"topk_rows_bits": "topk_rows", "selected_weight_grad_bias": "selected_weight_grad"}


def _checked(op: str) -> Callable[..., Any]:
    """The kernel of an operator that writes to none of its arguments."""
    check = getattr(_checks, _SAME_CHECK.get(op, op))

    def kernel(*args):
        check(*args)
        return getattr(resolve(args[0].device), op)(*args)

    return kernel


def _scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    _checks.scatter_rows_(weight, cols, values)
    resolve(weight.device).scatter_rows_(weight, cols, values)
    _bump_versions([weight])


def _selected_addmm_(output: Tensor, *others) -> None:
    _checks.selected_addmm_(output, *others)
    resolve(output.device).selected_addmm_(output, *others)
    _bump_versions([output])


def _masked_adam_(*args, numbers: Tensor | None = None, **kwargs) -> None:
    call, options = records(*args, **kwargs)
    if numbers is not None:
        check_numbers(numbers)
        options = options._replace(**dict(zip(NUMBERS, numbers.tolist(), strict=True)))
    if call.weights:
        resolve((call.exp_avgs or call.weights)[0].device).masked_adam_(call, options)
        _bump_versions([*call.weights, *call.values])


def _topk_masked_adam_(*args, **kwargs) -> None:
    call, options, bits = first_step_records(*args, **kwargs)
    check_first_step(call, bits)
    if call.weights:
        resolve(call.weights[0].device).topk_masked_adam_(call, options, bits)
        _bump_versions([*call.weights, *(tensor for made in (*call[3:8], call.indices, bits) for tensor in made)])


def _bump_versions(written: list[Tensor]) -> None:
    """Tells autograd that tensors have changed."""
    torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])


_IN_PLACE = {
    "scatter_rows_": _scatter_rows_,
    "selected_addmm_": _selected_addmm_,
    "masked_adam_": _masked_adam_,
    "topk_masked_adam_": _topk_masked_adam_,
}

# For every device and layout at once, so that what cannot run is refused by the checks, in our own words.
for _op in SCHEMAS:
    library.impl(_op, _IN_PLACE[_op] if _op in _IN_PLACE else _checked(_op), "CompositeExplicitAutograd")


def config() -> str:
    """The text that :func:`show_config` prints."""
    lines = [
        f"gradsel_kernels {__version__}",
        f"  python    {platform.python_version()} on {sys.platform} ({platform.machine()})",
        f"  torch     {torch.__version__}, {torch.get_num_threads()} threads, CUDA "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "not available"),
        f"  operators torch.ops.{NAMESPACE}: {', '.join(SCHEMAS)}",
        f"  in use    {_forced or 'chosen by device'}",
    ]
    for name in NAMES:
        module = backend(name)
        device_type = PREFERRED.get(name, "any")
        reason = module.why_off(torch.device("cpu" if device_type == "any" else device_type))
        lines.append(f"  {name:<9} {device_type}, " + (f"off: {reason}" if reason else f"on: {module.about()}"))
    return "\n".join(lines)


def show_config() -> None:
    """Prints the versions, and for each backend what it uses or why it is off."""
    print(config())
