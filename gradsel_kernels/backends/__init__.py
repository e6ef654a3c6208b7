"""The backends and how an operator finds one.

Each backend is a module with one function per operator, of the operator's name and signature, and two more:
``why_off(device)`` says in plain words why it cannot run there, ``about()`` what it uses. The torch dispatcher calls
the kernel that :func:`_entry` makes on every device; it runs the operator's checks, then the backend that
:func:`use_backend` forced, or else the one in :data:`PREFERRED` for the device, or else the reference.
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
from gradsel_kernels._ops import NAMESPACE, SCHEMAS, library
from gradsel_kernels._version import __version__

#: Fast backends, and the device type that each one serves unasked; of several the first that can run, and the reference
#: where none can. CUDA C++ comes after Triton until a measurement on a GPU says otherwise.
PREFERRED = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}
NAMES = (*PREFERRED, "reference")

_resolved: dict[torch.device, ModuleType] = {}
_forced: str | None = None
_told: set[str] = set()
_lock = threading.Lock()


def backend(name: str) -> ModuleType:
    """The module of a backend, imported at first use (importing Triton takes half a second)."""
    return importlib.import_module(f"gradsel_kernels.backends.{name}")


def _resolve(device: torch.device) -> ModuleType:
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
        "selections and, within rounding, the same updates, but much slower. gradsel_kernels.show_config() has more.",
        RuntimeWarning,
        stacklevel=7,  # the caller of the public function
    )


class _Forced:
    """What :func:`use_backend` returns: leaving it as a context manager restores the backend of before."""

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

    The setting holds at once and for the whole process, threads of the autograd engine included. Used as a context
    manager, it ends with the block. A backend that cannot run says why when an operation is called.
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


def _entry(op: str) -> Callable[..., Any]:
    """The kernel registered with the torch dispatcher for one operator."""
    check = getattr(_checks, _SAME_CHECK.get(op, op))

    def kernel(*args, **kwargs):
        check(*args, **kwargs)
        return getattr(_resolve(args[0].device), op)(*args, **kwargs)

    def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
        kernel(weight, cols, values)
        _bump_versions([weight])

    def masked_adam_(weights: list[Tensor], values: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
                     *args, **kwargs) -> None:  # fmt: skip
        if weights:
            module = _resolve(exp_avgs[0].device if exp_avgs else weights[0].device)
            if not getattr(module, "CHECKS_ADAM", False):
                check(weights, values, grads, exp_avgs, *args, **kwargs)
            module.masked_adam_(weights, values, grads, exp_avgs, *args, **kwargs)
            _bump_versions([*weights, *values])

    entries: dict[str, Callable[..., Any]] = {"scatter_rows_": scatter_rows_, "masked_adam_": masked_adam_}
    return entries.get(op, kernel)


def _bump_versions(written: list[Tensor]) -> None:
    """Tells autograd that tensors have changed."""
    torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])


for _op in SCHEMAS:  # for every device and layout at once: what cannot run is refused by the checks, in our words
    library.impl(_op, _entry(_op), "CompositeExplicitAutograd")


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
    """Prints versions, the backends, what each one uses, and why one is off."""
    print(config())
