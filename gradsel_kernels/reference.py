"""The specification: every operation in plain torch, on any device.

Nothing here is fast. Each function is written to be read, and the other backends are tested against it. Arguments
have passed :mod:`gradsel_kernels._checks`; what those cannot see (values of indices) is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsel_kernels._checks import WORD, Layout, grad_is_dense, sum_dtype, words


def topk_rows(grad: Tensor, k: int) -> Tensor:
    """Columns of the ``k`` largest magnitudes of each row: ties to the lowest column, NaN above infinity."""
    order = torch.sort(grad.abs(), dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values.to(torch.int32)


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cols = topk_rows(grad, k)
    mask = torch.zeros(grad.shape, dtype=torch.bool, device=grad.device)
    return cols, pack_bits(mask.scatter_(1, cols.long(), True))


def pack_bits(mask: Tensor) -> Tensor:
    """Bit j of word w of a row is column 32 w + j; the bits past the last column are zero."""
    rows, n = mask.shape
    padded = torch.zeros((rows, words(n) * WORD), dtype=torch.int64, device=mask.device)
    padded[:, :n] = mask
    weights = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(WORD, device=mask.device)
    return (padded.view(rows, words(n), WORD) * weights).sum(2).to(torch.int32)  # wraps bit 31 into the sign


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    lanes = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(2) >> lanes) & 1).bool().view(bits.shape[0], bits.shape[1] * WORD)[:, :n].contiguous()


def bits_to_cols(bits: Tensor, k: int) -> Tensor:
    """The first ``k`` set columns of each row, ascending; -1 where a row has fewer."""
    mask = unpack_bits(bits, bits.shape[1] * WORD)
    rank = mask.cumsum(1) - 1
    row, col = (mask & (rank < k)).nonzero(as_tuple=True)
    cols = torch.full((bits.shape[0], k), -1, dtype=torch.int32, device=bits.device)
    cols[row, rank[row, col]] = col.to(torch.int32)
    return cols


def check_range(name: str, index: Tensor, end: int) -> None:
    """Refuses indices outside 0 .. end - 1, before anything is read or written with them."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= end):
        found = f"{int(index.min())} to {int(index.max())}"
        raise IndexError(f"{name} must lie in 0 to {end - 1}, found {found}")


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    check_range("cols", cols, weight.shape[1])
    return weight[_row_numbers(weight), cols.long()]


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    check_range("cols", cols, weight.shape[1])
    weight[_row_numbers(weight), cols.long()] = values.to(weight.dtype)


def _row_numbers(weight: Tensor) -> Tensor:
    # Indexing, not Tensor.gather and scatter_: on the CPU those rewrite the payload of bfloat16 NaNs, scatter_ even of
    # those that cols does not name.
    return torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)


def take_columns(input: Tensor, columns: Tensor) -> Tensor:
    """The columns of an activation that backward needs, each with its tokens one after the other in memory."""
    check_range("columns", columns, input.shape[-1])
    return input[..., columns.long()].mT.contiguous()


def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> Tensor:
    """The selected entries of ``grad_output^T @ input``; every strategy has this result."""
    check_range("cols", cols, input.shape[-1])
    rows = grad_output.shape[-1]
    row = torch.arange(rows, device=cols.device)
    if row_offsets is None:
        row = row.unsqueeze(1)
    else:
        check_offsets(row_offsets, cols.shape[0])
        row = row.repeat_interleave(row_offsets.diff())
    return _flat_tokens(grad_output).t().mm(_flat_tokens(input))[row, cols.long()]


def selected_weight_grad_bias(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> tuple[Tensor, Tensor]:
    grad = selected_weight_grad(grad_output, input, cols, row_offsets, strategy)
    return grad, _flat_tokens(grad_output).sum(0)


def check_offsets(row_offsets: Tensor, nnz: int) -> None:
    """Refuses row offsets that do not cut 0 .. nnz into consecutive rows."""
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != nnz or bool((row_offsets.diff() < 0).any()):
        raise IndexError(f"row_offsets must ascend from 0 to {nnz}, the size of cols")


def _flat_tokens(activations: Tensor) -> Tensor:
    """[tokens, features] in the dtype of sums."""
    return activations.reshape(activations.shape[:-1].numel(), activations.shape[-1]).to(sum_dtype(activations.dtype))


def masked_adam_(
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
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    anchor: float,
    anchor_l1: bool,
    anchor_decoupled: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    stochastic: Sequence[bool] = (),
    compensations: Sequence[Tensor] | None = None,
) -> None:
    """One step of Adam on the selected entries of every tensor; everything else is left as it is, to the bit."""
    if found_inf is not None and found_inf.item() != 0:
        return
    views = [
        _as_rows(weight, index, layout) if weight.numel() else None
        for weight, index, layout in zip(weights, indices, layouts, strict=True)
    ]
    entries = [  # all of them first: an index out of range is found before anything has changed
        None if view is None else _selected(view, indices[i], layouts[i], exp_avgs[i].numel(), f"tensor {i}: indices")
        for i, view in enumerate(views)
    ]
    for i, (view, entry) in enumerate(zip(views, entries, strict=True)):
        state = [exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
        shape, dtype = state[0].shape, sum_dtype(state[0].dtype)
        compensation = compensations[i] if compensations and compensations[i].numel() else None
        grad = grads[i]
        if entry is not None and grad_is_dense(grad, weights[i]):
            grad = _as_rows(grad, indices[i], layouts[i])[entry]
        grad = grad.to(dtype).reshape(shape)
        if grad_scale is not None:
            grad = grad / grad_scale.reshape(())
        if values and values[i].numel():
            param = values[i]
        elif view is not None:
            param = view[entry].to(dtype).reshape(shape)
            if compensation is not None:
                param += compensation
        else:
            param = torch.empty_like(state[0], dtype=dtype)  # nothing selected: only the step counts
        moments = [moment.to(dtype) for moment in state]
        adam_math(
            param,
            grad,
            moments[0],
            moments[1],
            moments[2] if max_exp_avg_sqs else None,
            originals[i] if originals else None,
            steps[i],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            anchor=anchor,
            anchor_l1=anchor_l1,
            anchor_decoupled=anchor_decoupled,
        )
        for stored, moment in zip(state, moments, strict=True):
            if stored is not moment:
                stored.copy_(moment)
        if view is None:
            continue
        param = param.reshape(-1)
        if stochastic and stochastic[i]:
            number = torch.arange(param.numel(), device=param.device)
            words = random_words(seeds[i], int(steps[i].item()), number)
            param = round_stochastically(param, view.dtype, words)
        rounded = param.to(view.dtype)
        view[entry] = rounded
        if compensation is not None:
            lost = param - rounded.to(dtype)
            compensation.view(-1).copy_(torch.where(lost.isfinite(), lost, 0.0))


def adam_math(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    original: Tensor | None,
    step: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    anchor: float,
    anchor_l1: bool,
    anchor_decoupled: bool,
) -> None:
    """Adam (Kingma and Ba 2015, Alg. 1) and AdamW (Loshchilov and Hutter 2019, Alg. 2), in place on compact tensors.

    The order of operations is that of ``torch.optim.Adam(foreach=False, fused=False)``, so the results are bit-equal
    to it in float32 and float64. Bias corrections are computed in double precision. Weight decay comes first, then the
    anchor (GRFT, Alg. 1 line 8), which sees the parameter as decoupled weight decay has left it.
    """
    step += 1
    t = step.item()
    if maximize:
        grad = -grad
    if weight_decay != 0:
        if decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        else:
            grad = grad.add(param, alpha=weight_decay)
    if original is not None and anchor != 0:
        if anchor_decoupled:
            pull_(param, original, lr * anchor, anchor_l1)
        else:
            gap = param - original
            grad = grad.add(gap.sign(), alpha=anchor) if anchor_l1 else grad.add(gap, alpha=2 * anchor)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**t)
    root_of_correction = math.sqrt(1 - beta2**t)
    if max_exp_avg_sq is None:
        second_moment = exp_avg_sq
    else:
        second_moment = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = (second_moment.sqrt() / root_of_correction).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


def pull_(param: Tensor, original: Tensor, amount: float, l1: bool) -> None:
    """Moves a parameter towards its original value by a step of gradient descent (L2) or a proximal step (L1).

    The proximal step is soft thresholding, original + sign(gap) * max(abs(gap) - amount, 0). Written as a step from the
    parameter it is rounded once, however far away the original is, and an amount of 0 moves nothing.
    """
    gap = param - original
    if l1:
        moved = param.add(gap.sign(), alpha=-amount)
        param.copy_(torch.where(gap.abs() <= amount, original, moved))
    else:
        param.add_(gap, alpha=-2 * amount)


_UINT32 = 0xFFFFFFFF


def mix(x):
    """A bijection of 32 bits in which every bit of x moves about half the others; int or int64 tensor, 0 to 2**32 - 1.

    Two multiplications and three shifts with the constants of C. Wellons' search for small bias ("hash-prospector").
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _UINT32
    x = (x ^ (x >> 15)) * 0x735A2D97 & _UINT32
    return x ^ (x >> 15)


def random_keys(seed: int, t: int) -> tuple[int, int]:
    """What the random words of a tensor's step t are made from: no two seeds share it in one step.

    The second key must not be mixed from the first as a word is: some entry would have the same word in every step.
    """
    low = mix(seed & _UINT32)
    high = mix((seed >> 32 & _UINT32) ^ low)
    return mix((t & _UINT32) ^ low), mix((~t & _UINT32) ^ high)


def random_words(seed: int, t: int, entry: Tensor) -> Tensor:
    """A uniform number of 32 bits, as int64, for each entry, given by its int64 number in mask order."""
    first, second = random_keys(seed, t)
    return mix(mix((entry & _UINT32) ^ first) ^ (entry >> 32) ^ second)


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 numbers moved to a neighbour in bfloat16 or float16, away from zero where the word is below the fraction.

    The fraction is how far x is on its way between the two, in units of 2**-32, rounded down: that is exact, but for
    x below 2**-33 in float16, where a part of one such unit is lost.
    """
    dropped = 16 if dtype is torch.bfloat16 else 13  # bits of the mantissa
    bits = x.view(torch.int32).long() & _UINT32
    away = words < (bits << (32 - dropped) & _UINT32)
    rounded = ((bits >> dropped) + away << dropped).to(torch.int32).view(torch.float32)
    if dtype is torch.float16:  # below 2**-14 its numbers are the multiples of 2**-24
        multiple = x.abs().clamp(max=2.0**-14) * 2.0**24
        whole = multiple.floor()
        away = words < ((multiple - whole) * 2.0**32).long()
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign((whole + away) * 2.0**-24, x), rounded)
    return torch.where(x.isfinite(), rounded, x)


def _as_rows(tensor: Tensor, index: Tensor, layout: int) -> Tensor:
    """The neuron view [rows, cols] of a dense tensor: itself if 2-D, else its memory cut into the mask's rows."""
    if layout in (Layout.COLS, Layout.BITS) and tensor.ndim != 2:
        return tensor.view(index.shape[0], -1)
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)


def _selected(view: Tensor, index: Tensor, layout: int, nnz: int, name: str) -> tuple[Tensor, Tensor]:
    """Rows and columns of the selected entries of a neuron view, in mask order, each int64 [nnz]."""
    rows, cols = view.shape
    if layout == Layout.ALL:
        flat = torch.arange(nnz, device=view.device)
    elif layout == Layout.FLAT:
        check_range(name, index, rows * cols)
        flat = index.reshape(-1).long()
    elif layout == Layout.COLS:
        check_range(name, index, cols)
        flat = (torch.arange(rows, device=view.device).unsqueeze(1) * cols + index).reshape(-1)
    else:
        mask = unpack_bits(index, index.shape[1] * WORD)
        if bool(mask[:, cols:].any()):
            raise IndexError(f"{name} has bits set past the last of {cols} columns")
        if int(mask.sum()) != nnz:
            raise ValueError(f"{name} has {int(mask.sum())} bits set, but exp_avg has {nnz} entries")
        flat = mask[:, :cols].reshape(-1).nonzero().reshape(-1)
    return flat // cols, flat % cols
