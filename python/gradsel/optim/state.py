"""The state of MaskedAdam for one parameter: converted from and to checkpoints, dense runs and other selections.

The tensors of a state are in mask order. They are saved with the mask's fingerprint, because moments of another
selection may have the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, fingerprint
from gradsel.optim.call import State, Target
from gradsel.tables import shape_text

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
#: One value for each selected entry.
_IN_MASK_ORDER = (*MOMENTS, "original", "master", "compensation")
#: The key of the mask's fingerprint in the state of a parameter that is trained in part.
FINGERPRINT = "mask_fingerprint"


def fitted(saved: Mapping[str, Any], target: Target, name: str) -> State:
    """A saved state of one parameter, fitted to its mask. It shares nothing with ``saved``.

    Args:
        saved: a state from MaskedAdam, or a dense one from ``torch.optim.Adam``, of which the selected entries are
            taken.
        target: the parameter with its mask.
        name: of the parameter, for messages.

    Raises:
        ValueError: the state belongs to another selection.
    """
    mask, device, dtype = target.mask, target.parameter.device, trained_dtype(target.weight)
    known = FINGERPRINT in saved
    if known and (mask.is_whole or saved[FINGERPRINT] != fingerprint(mask)):
        raise ValueError(
            f"the state_dict was trained with another selection of {name}; load it with the masks of that run, or "
            "load its optimizer.dense_state_dict(), or change masks by optimizer.reselect()"
        )
    if not mask.nnz:
        return {}
    state: State = {}
    for key, value in saved.items():
        if key == "step":
            state[key] = torch.as_tensor(value).detach().to(device, torch.float32, copy=True)
        elif key in _IN_MASK_ORDER:
            own = target.weight.dtype if key == "compensation" else dtype
            state[key] = _selected(torch.as_tensor(value).detach(), mask, not known, f"{key} of {name}", device, own)
        else:
            state[key] = value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
    if not mask.is_whole:
        state[FINGERPRINT] = fingerprint(mask)
    if target.is_compact or target.parameter.dtype is dtype:
        for key in ("master", "compensation"):
            state.pop(key, None)  # from a run in lower precision; here nothing is rounded
    return state


def _selected(
    value: Tensor, mask: Mask, may_be_dense: bool, what: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The selected entries, as a contiguous copy."""
    shape = tuple(value.shape)
    if shape == mask.shape and may_be_dense:
        return mask.gather(value.to(device)).to(dtype)
    if shape == mask.compact_shape:
        return value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    raise ValueError(
        f"{what} has shape {shape_text(shape)} in the state_dict, but the mask selects "
        f"{shape_text(mask.compact_shape)}; load the state of a run with the same selection"
    )


def is_dense(state: Mapping[str, Any] | None, mask: Mask) -> bool:
    """Whether a saved state has moments of all entries instead of those that a mask selects."""
    if not state or FINGERPRINT in state or "exp_avg" not in state:
        return False
    return tuple(torch.as_tensor(state["exp_avg"]).shape) != mask.compact_shape


def dense(state: State, mask: Mask) -> State:
    """A copy of the state for torch's Adam: the step, and moments that are zero at entries that are not selected."""
    return {
        key: value.clone() if key == "step" else scattered(mask, value.to(trained_dtype(value)))
        for key, value in state.items()
        if key == "step" or key in MOMENTS
    }


def scattered(mask: Mask, values: Tensor) -> Tensor:
    """Zeros in the shape of the parameter, with ``values`` at the selected entries."""
    result = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    mask.scatter_(result, values)
    return result


def migrated(state: State, old: Mask, new: Mask, weight: Tensor) -> State:
    """The state for another mask: entries that both masks select keep their bits, new ones start as in a first step.

    Args:
        weight: its entries are the masters and originals of the new entries.
    """
    if not state or not new.nnz:
        return {}
    moved = dict(state)
    for key in _IN_MASK_ORDER:
        if key in state:
            start = torch.clone if key in ("original", "master") else torch.zeros_like
            everywhere = start(weight.detach().to(state[key].dtype), memory_format=torch.contiguous_format)
            old.scatter_(everywhere, state[key])
            moved[key] = new.gather(everywhere).contiguous()
    moved.pop(FINGERPRINT, None)
    return moved if new.is_whole else {**moved, FINGERPRINT: fingerprint(new)}


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    tensors: Iterable[Any] = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
