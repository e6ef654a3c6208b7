"""The specification: every operation in plain torch, on any device.

Nothing here is fast. Each function is written to be read, and the other backends are tested against it. Arguments
have passed the checks; the values of indices, which those never look at, are checked here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsel_kernels._checks import WORD, Layout, sum_dtype, words
from gradsel_kernels.adam_call import AdamCall, AdamOptions, entry, grad_is_dense, neuron_view


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


def selected_addmm_(output: Tensor, input: Tensor, cols: Tensor, values: Tensor, row_offsets: Tensor | None) -> None:
    """``output += input @ D.T`` for D with ``values`` at ``cols``; the sum is rounded to the dtype of output once."""
    check_range("cols", cols, input.shape[1])
    products = input.to(values.dtype)[:, cols.long()] * values
    if row_offsets is None:
        sums = products.sum(-1)
    else:
        check_offsets(row_offsets, cols.shape[0])
        row = torch.arange(output.shape[1], device=cols.device).repeat_interleave(row_offsets.diff())
        sums = torch.zeros(output.shape, dtype=values.dtype, device=cols.device).index_add_(1, row, products)
    output.copy_(output.to(values.dtype) + sums)


def check_offsets(row_offsets: Tensor, nnz: int) -> None:
    """Refuses row offsets that do not cut 0 .. nnz into consecutive rows."""
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != nnz or bool((row_offsets.diff() < 0).any()):
        raise IndexError(f"row_offsets must ascend from 0 to {nnz}, the size of cols")


def _flat_tokens(activations: Tensor) -> Tensor:
    """[tokens, features] in the dtype of sums."""
    return activations.reshape(activations.shape[:-1].numel(), activations.shape[-1]).to(sum_dtype(activations.dtype))


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    """One step of Adam on the selected entries of every tensor; not one bit of anything else changes."""
    if call.found_inf is not None and call.found_inf.item() != 0:
        return
    # All indices are looked at before anything is written: one out of range then leaves everything as it was.
    for i, selected in enumerate([_selected(call, i) for i in range(len(call.weights))]):
        _adam_step(call, options, i, selected)


def _adam_step(call: AdamCall, options: AdamOptions, i: int, selected: tuple[Tensor, Tensor] | None) -> None:
    """The step of tensor i, whose selected entries lie at these rows and columns."""
    weight, grad, index, layout = call.weights[i], call.grads[i], call.indices[i], call.layouts[i]
    stored = [call.exp_avgs[i], call.exp_avg_sqs[i], *call.max_exp_avg_sqs[i : i + 1]]
    shape, dtype = stored[0].shape, sum_dtype(stored[0].dtype)
    view = None if selected is None else neuron_view(weight, index, layout)
    value, compensation = entry(call.values, i), entry(call.compensations, i)
    if selected is not None and grad_is_dense(grad, weight):
        grad = neuron_view(grad, index, layout)[selected]
    grad = grad.to(dtype).reshape(shape)
    if call.grad_scale is not None:
        grad = grad / call.grad_scale.reshape(())
    if value is not None:
        param = value
    elif view is not None:
        param = view[selected].to(dtype).reshape(shape)
        if compensation is not None:
            param += compensation
    else:
        param = torch.empty_like(stored[0], dtype=dtype)  # nothing is selected: only the step counts
    moments = [moment.to(dtype) for moment in stored]
    original = call.originals[i] if call.originals else None
    adam_math(param, grad, moments, original, call.steps[i], options)
    for to, moment in zip(stored, moments, strict=True):
        if to is not moment:
            to.copy_(moment)
    if view is None:
        return
    param = param.reshape(-1)
    if call.stochastic and call.stochastic[i]:
        number = torch.arange(param.numel(), device=param.device)
        param = round_stochastically(param, view.dtype, random_words(call.seeds[i], int(call.steps[i].item()), number))
    rounded = param.to(view.dtype)
    view[selected] = rounded
    if compensation is not None:
        lost = param - rounded.to(dtype)
        compensation.view(-1).copy_(torch.where(lost.isfinite(), lost, 0.0))


def topk_masked_adam_(call: AdamCall, options: AdamOptions, bits: list[Tensor]) -> None:
    """Selects by the gradients, makes the states of the selected entries, and does their first step."""
    for i, (weight, grad, cols) in enumerate(zip(call.weights, call.grads, call.indices, strict=True)):
        found, packed = topk_rows_bits(grad, cols.shape[1])
        cols.copy_(found)
        if bits:
            bits[i].copy_(packed)
        zeros = [call.exp_avgs[i], call.exp_avg_sqs[i], *call.max_exp_avg_sqs[i : i + 1], call.steps[i]]
        if call.compensations:
            zeros.append(call.compensations[i])
        for state in zeros:
            state.zero_()
        for copy in (entry(call.values, i), entry(call.originals, i)):
            if copy is not None:
                copy.copy_(weight.gather(1, found.long()))
    masked_adam_(call, options)


def adam_math(
    param: Tensor, grad: Tensor, moments: list[Tensor], original: Tensor | None, step: Tensor, options: AdamOptions
) -> None:
    """Adam (Kingma and Ba 2015, Alg. 1) and AdamW (Loshchilov and Hutter 2019, Alg. 2), in place on compact tensors.

    The order of operations is that of ``torch.optim.Adam(foreach=False, fused=False)``, so the results are bit-equal
    to it in float32 and float64. Bias corrections are computed in double precision. Weight decay comes first, then the
    anchor (GRFT, Alg. 1 line 8), which sees the parameter as decoupled weight decay has left it.
    """
    exp_avg, exp_avg_sq = moments[:2]
    lr, beta1, beta2 = options.lr, options.beta1, options.beta2
    step += 1
    t = step.item()
    if options.maximize:
        grad = -grad
    if options.weight_decay != 0:
        if options.decoupled_weight_decay:
            param.mul_(1 - lr * options.weight_decay)
        else:
            grad = grad.add(param, alpha=options.weight_decay)
    if original is not None and options.anchor != 0:
        if options.anchor_decoupled:
            pull_(param, original, lr * options.anchor, options.anchor_l1)
        else:
            gap = param - original
            grad = (
                grad.add(gap.sign(), alpha=options.anchor)
                if options.anchor_l1
                else grad.add(gap, alpha=2 * options.anchor)
            )
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**t)
    root_of_correction = math.sqrt(1 - beta2**t)
    second_moment = exp_avg_sq
    if len(moments) > 2:
        second_moment = torch.maximum(moments[2], exp_avg_sq, out=moments[2])
    denominator = (second_moment.sqrt() / root_of_correction).add_(options.eps)
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


def _selected(call: AdamCall, i: int) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of tensor i's selected entries in mask order, each int64 [nnz]; None without a weight."""
    if not call.weights[i].numel():
        return None
    index, layout, nnz, name = call.indices[i], call.layouts[i], call.exp_avgs[i].numel(), f"tensor {i}: indices"
    view = neuron_view(call.weights[i], index, layout)
    rows, cols = view.shape
    if layout == Layout.ALL:
        flat = torch.arange(nnz, device=view.device)
    elif layout == Layout.FLAT:
        check_range(name, index, rows * cols)
        flat = index.reshape(-1).long()
    else:
        check_range(name, index, cols)
        flat = (torch.arange(rows, device=view.device).unsqueeze(1) * cols + index).reshape(-1)
    return flat // cols, flat % cols
