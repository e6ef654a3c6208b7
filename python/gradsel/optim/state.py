"""The state of MaskedAdam for one parameter: from and to checkpoints, dense runs and other selections.

Tensors of a state lie in mask order. A mask's fingerprint goes with them, because moments of another selection may well
have the same shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask
from gradsel.optim.call import Route, State
from gradsel.tables import shape_text

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
#: One value for each selected entry.
_IN_MASK_ORDER = (*MOMENTS, "original", "master", "compensation")
#: The key of a mask's fingerprint, in the state of parameters that are trained in part.
FINGERPRINT = "mask_fingerprint"


def fingerprint(mask: Mask) -> int:
    """63 bits that depend on the selected entries and their order.

    A number, because torch takes numbers in a state through ``load_state_dict`` as they are: integer tensors it casts
    to the dtype of the parameter, strings it takes to pieces.
    """
    digest = hashlib.blake2b(f"{mask.kind} {mask.shape} {mask.describe()}".encode(), digest_size=8)
    for tensor in mask.tensors().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def fitted(saved: Mapping[str, Any], route: Route, name: str) -> State:
    """What a state_dict holds of one parameter as a state of our own; nothing of it is shared.

    Args:
        saved: the state that MaskedAdam saved, or a dense one of ``torch.optim.Adam``, of which the selected entries
            are taken.
        route: of the parameter.
        name: the parameter's, for messages.

    Raises:
        ValueError: it belongs to another selection.
    """
    mask, device, dtype = route.mask, route.parameter.device, trained_dtype(route.weight)
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
            own = route.weight.dtype if key == "compensation" else dtype
            state[key] = _selected(torch.as_tensor(value).detach(), mask, not known, f"{key} of {name}", device, own)
        else:
            state[key] = value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
    if not mask.is_whole:
        state[FINGERPRINT] = fingerprint(mask)
    if route.is_compact or route.parameter.dtype is dtype:
        for key in ("master", "compensation"):
            state.pop(key, None)  # of a run in lower precision; these weights are exact
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
    """Whether a saved state has moments, and not for the entries of a mask."""
    if not state or FINGERPRINT in state or "exp_avg" not in state:
        return False
    return tuple(torch.as_tensor(state["exp_avg"]).shape) != mask.compact_shape


def dense(state: State, mask: Mask) -> State:
    """The state as torch's Adam has it: step and moments, zero where nothing is selected. A copy."""
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
    """The state for another mask: what both select is kept to the bit, the rest begins as a first step would.

    Args:
        weight: whose entries are the masters and originals of those that nobody has trained.
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
