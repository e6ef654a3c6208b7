"""The checks of ``masked_adam_``'s arguments; like those in ``_checks``, they never look at values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsel_kernels._checks import FLOATS, Layout, describe, floating, no_overlap, same_device, sum_dtype
from gradsel_kernels.adam_call import NUMBERS, RATES, AdamCall, entry, grad_is_dense


def masked_adam_(call: AdamCall) -> None:
    _lengths(call)
    for i in range(len(call.weights)):
        try:
            _one_tensor(call, i)
            _rounding(call, i)
        except (TypeError, ValueError) as error:
            raise type(error)(f"tensor {i}: {error}") from None
    if call.weights:
        scaler(call)


def scaler(call: AdamCall) -> None:
    """Checks what a gradient scaler passes, and hyperparameters on the device."""
    device = call.exp_avgs[0].device
    rates = call.rates
    wanted = (torch.float64, (len(RATES),), (1,), device)
    if rates is not None and (rates.dtype, rates.shape, rates.stride(), rates.device) != wanted:
        raise ValueError(
            f"rates must be contiguous float64 [{len(RATES)}] on {device} ({', '.join(RATES)}), got {describe(rates)}"
        )
    for name, scalar in (("grad_scale", call.grad_scale), ("found_inf", call.found_inf)):
        if scalar is None:
            continue
        if scalar.numel() != 1 or scalar.dtype is not torch.float32 or scalar.device != device:
            raise ValueError(f"{name} must be one float32 on {device}, got {describe(scalar)}")


def numbers(given: Tensor | None) -> None:
    """Checks hyperparameters that come as a tensor."""
    wanted = len(NUMBERS)
    if given is None or (given.dtype is torch.float64 and given.shape == (wanted,) and given.device.type == "cpu"):
        return
    raise ValueError(f"numbers must be {wanted} float64 on the CPU ({', '.join(NUMBERS)}), got {describe(given)}")


def split_seeds(seeds: Sequence[int | None]) -> tuple[list[int], list[bool]]:
    """The seeds as the operator takes them: a number for each tensor, and whether it applies."""
    for i, seed in enumerate(seeds):
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"tensor {i}: seed must be an int64, -2**63 to 2**63 - 1, or None, got {seed}")
    return [seed or 0 for seed in seeds], [seed is not None for seed in seeds]


def _lengths(call: AdamCall) -> None:
    count = len(call.weights)
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps", "indices", "layouts"):
        found = len(getattr(call, name))
        if found != count:
            raise ValueError(f"{name} has {found} entries, but weights has {count}; pass one for each tensor")
    for name in ("values", "max_exp_avg_sqs", "originals", "seeds", "compensations"):
        found = len(getattr(call, name))
        if found not in (0, count):
            raise ValueError(f"{name} has {found} entries; pass none, or one for each of the {count} weights")
    if len(set(map(id, call.steps))) < count:
        raise ValueError("two tensors have the same step; each counts its own, so pass a separate tensor for each")
    if len(call.stochastic) != len(call.seeds):
        raise ValueError(
            f"stochastic has {len(call.stochastic)} entries, but seeds has {len(call.seeds)}; it says which seeds apply"
        )


def _one_tensor(call: AdamCall, i: int) -> None:
    weight, grad, exp_avg, step = call.weights[i], call.grads[i], call.exp_avgs[i], call.steps[i]
    index, layout = call.indices[i], call.layouts[i]
    shape, dtype, nnz = exp_avg.shape, exp_avg.dtype, exp_avg.numel()
    value = entry(call.values, i)
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"exp_avg must be float32 or bfloat16 (float64 for float64 weights), got {dtype}")
    _in_mask_order("exp_avg_sq", call.exp_avg_sqs[i], dtype, exp_avg)
    if call.max_exp_avg_sqs:
        _in_mask_order("max_exp_avg_sq", call.max_exp_avg_sqs[i], dtype, exp_avg)
    if call.originals:
        _in_mask_order("original", call.originals[i], sum_dtype(dtype), exp_avg)
    if value is not None:
        _in_mask_order("values", value, sum_dtype(dtype), exp_avg)
    if not exp_avg.is_contiguous():
        raise ValueError(f"exp_avg must be contiguous, got strides {exp_avg.stride()}")
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64) or step.device != exp_avg.device:
        raise ValueError(f"step must be one float on {exp_avg.device}, got {describe(step)}")

    rows = _index(index, layout, shape, nnz)
    if layout != Layout.ALL:
        same_device("indices", index, "exp_avg", exp_avg)
    if weight.numel() != 0:
        if weight.dtype not in FLOATS or (weight.dtype is torch.float64 and dtype is not torch.float64):
            raise TypeError(f"weight is {weight.dtype}, which a state of {dtype} cannot train")
        same_device("weight", weight, "exp_avg", exp_avg)
        no_overlap("weight", weight)
        _dense_view("weight", weight, layout, rows, nnz)
    elif nnz == 0:
        return  # nothing is selected: the step is counted, and nothing else is read
    elif value is None:
        raise ValueError("there are neither values nor a weight to update; pass one of them")
    elif grad.shape != shape:
        raise ValueError(f"without a weight the gradient must be compact {list(shape)}, got {list(grad.shape)}")

    if grad.layout is not torch.strided:
        raise TypeError(f"grad must be dense, got {grad.layout}; Adam does not support sparse gradients")
    floating("grad", grad)
    same_device("grad", grad, "exp_avg", exp_avg)
    if grad_is_dense(grad, weight):
        _dense_view("grad", grad, layout, rows, nnz)
    elif grad.shape == shape:
        if not grad.is_contiguous():
            raise ValueError(f"a compact grad must be contiguous, got strides {grad.stride()}")
    else:
        raise ValueError(
            f"grad must be dense with the shape of the weight {list(weight.shape)} or compact {list(shape)}, "
            f"got {list(grad.shape)}"
        )


def _in_mask_order(name: str, tensor: Tensor, dtype: torch.dtype, exp_avg: Tensor) -> None:
    if tensor.dtype is not dtype or tensor.shape != exp_avg.shape:
        because = "" if exp_avg.dtype is dtype else f"; exp_avg is {exp_avg.dtype}"
        raise ValueError(f"{name} must match exp_avg ({dtype} {list(exp_avg.shape)}), got {describe(tensor)}{because}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    same_device(name, tensor, "exp_avg", exp_avg)


def _rounding(call: AdamCall, i: int) -> None:
    """Stochastic rounding and compensation are for weights too coarse to hold their updates."""
    weight, exp_avg = call.weights[i], call.exp_avgs[i]
    stochastic = bool(call.stochastic) and call.stochastic[i]
    compensation = entry(call.compensations, i)
    if not (stochastic or compensation is not None) or not (weight.numel() or exp_avg.numel()):
        return
    if stochastic and compensation is not None:
        raise ValueError("it has a seed and a compensation; round stochastically or compensate, not both")
    name = "a seed" if stochastic else "a compensation"
    if weight.numel() == 0:
        raise ValueError(f"{name} needs a weight to round, got none")
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name} needs a bfloat16 or float16 weight, got {weight.dtype}, which needs no such rounding")
    if entry(call.values, i) is not None:
        raise ValueError(f"{name} is for a weight without values, which hold what rounding loses; drop one of them")
    if exp_avg.dtype is torch.float64:
        raise TypeError(f"{name} needs moments in float32 or bfloat16, got {exp_avg.dtype}")
    if compensation is not None:
        _in_mask_order("compensation", compensation, weight.dtype, exp_avg)


def _index(index: Tensor, layout: int, shape: torch.Size, nnz: int) -> int | None:
    """Checks one index tensor; returns the rows of the mask if it has any (COLS)."""
    if layout == Layout.ALL:
        return None
    if not index.is_contiguous():
        raise ValueError(f"indices must be contiguous, got strides {index.stride()}")
    if layout == Layout.FLAT:
        if index.dtype not in (torch.int32, torch.int64) or index.numel() != nnz:
            raise ValueError(f"flat indices must be {nnz} int32 or int64 (the size of exp_avg), got {describe(index)}")
        return None
    if layout != Layout.COLS:
        raise ValueError(f"unknown layout {layout}; layouts are {', '.join(f'{x.value} ({x.name})' for x in Layout)}")
    if index.dtype is not torch.int32 or index.ndim != 2:
        raise ValueError(f"columns must be int32 [rows, k], got {describe(index)}")
    if index.shape != shape:
        raise ValueError(f"columns must have the shape of exp_avg {list(shape)}, got {list(index.shape)}")
    return index.shape[0]


def _dense_view(name: str, tensor: Tensor, layout: int, rows: int | None, nnz: int) -> None:
    """A dense tensor is contiguous, whatever its shape, or any 2-D view; the mask must fit its rows."""
    if tensor.ndim > 2 and not tensor.is_contiguous():
        raise ValueError(f"{name} has {tensor.ndim} dimensions and strides {tensor.stride()}; pass a 2-D view of it")
    if layout == Layout.ALL and tensor.numel() != nnz:
        raise ValueError(f"{name} has {tensor.numel()} entries, but exp_avg has {nnz}; without a mask they are equal")
    if rows is None:
        return
    if (tensor.shape[0] if tensor.ndim == 2 else rows) != rows or (rows and tensor.numel() % rows):
        raise ValueError(f"the mask is for {rows} rows, but {name} is {list(tensor.shape)}")
