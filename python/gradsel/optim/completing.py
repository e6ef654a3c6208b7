"""The state of MaskedAdam for one parameter, completed before a step: what is missing is added, the rest adapted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsel.dtypes import adopted, trained_dtype
from gradsel.masks import Mask, fingerprint
from gradsel.optim.call import State, Target
from gradsel.optim.state import FINGERPRINT, MOMENTS
from gradsel.sharding import sharded_like, whole_of


def complete(state: State, target: Target, group: dict[str, Any], may_be_written: bool) -> None:
    """Adds what a state lacks, and adapts it to the options of its group and to the dtype of its parameter.

    A new state lacks everything; the loaded state of a float32 run lacks a master. Originals that attach() keeps share
    their memory with the state where the dtypes are the same.

    Args:
        may_be_written: something other than this optimizer may have written the parameter since the last step.
    """
    parameter, _, mask, _ = target
    dtype = trained_dtype(parameter)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    moments = dtype if dtype is torch.float64 else group["state_dtype"] or dtype
    for name in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        if name not in state:
            state[name] = _zeros(target, moments)
        elif state[name].dtype != moments:  # state_dtype was another one
            state[name] = state[name].to(moments)
    if FINGERPRINT not in state and not mask.is_whole:
        state[FINGERPRINT] = fingerprint(mask)
    if group["anchor"] and "original" not in state:
        state["original"] = _original(target).to(dtype)
    if "original" in state and state["original"].dtype != dtype:  # the model was cast
        state["original"] = state["original"].to(dtype)
    if parameter.dtype != dtype:
        _complete_low_precision(state, parameter, mask, group["low_precision"], may_be_written)
    else:
        for name in ("master", "compensation"):
            state.pop(name, None)


def _zeros(target: Target, dtype: torch.dtype) -> Tensor:
    """One for each selected entry, sharded like the parameter."""
    parameter = target.parameter
    if target.is_sharded:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(target.mask.compact_shape, dtype=dtype, device=parameter.device)


def _original(target: Target) -> Tensor:
    """The selected entries before training, sharded like the parameter."""
    if target.selected is None:
        return target.mask.gather(target.parameter)
    entries = target.selected.entries
    return sharded_like(whole_of(entries), target.parameter) if target.is_sharded else entries


def _complete_low_precision(state: State, parameter: Tensor, mask: Mask, mode: str, may_be_written: bool) -> None:
    """Adds the master or the compensation that ``mode`` needs, and drops those of another mode.

    Args:
        mode: the option ``low_precision``.
    """
    dtype = trained_dtype(parameter)
    lost = state.get("compensation")
    if mode != "kahan":
        state.pop("compensation", None)
    if mode != "master":
        master = state.pop("master", None)
        if mode == "kahan" and (lost is None or lost.dtype != parameter.dtype):
            weight = mask.gather(parameter)
            trained = weight.to(dtype) if master is None else master
            state["compensation"] = (trained - weight.to(dtype)).nan_to_num(0.0, 0.0, 0.0).to(parameter.dtype)
    elif "master" not in state:
        state["master"] = mask.gather(parameter).to(dtype)
        if lost is not None:
            state["master"] += lost
    elif may_be_written:
        # Where the weight is no longer the rounded master, somebody has written it (by loading a checkpoint, for
        # example), and the master takes over the new value.
        state["master"] = adopted(state["master"], mask.gather(parameter))
