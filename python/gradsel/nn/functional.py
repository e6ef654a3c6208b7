"""Layers whose backward computes the selected entries of the weight's gradient, and no others.

Each function is the torch function of the same name with two more arguments: ``values``, the selected entries as a
parameter of their own, and how to compute their gradient. ``weight`` holds the same entries, is read by forward, and
gets no gradient itself. Where no gradient is wanted, they are the torch functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn import grad as input_grads

from gradsel.masks import Mask
from gradsel.masks.weight_grad import Lookup, Product, Taps, once

#: Copies of a convolution's taps that backward holds at a time, in bytes: batches are cut to stay below.
TAP_BYTES = 2**26


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, product: Product) -> Tensor:
    """``torch.nn.functional.linear``, with gradients for ``input``, ``bias`` and ``values``.

    Args:
        input: [..., n].
        weight: [rows, n], any strides (the transposed weight of transformers' ``Conv1D``, for example).
        bias: [rows], or None.
        values: the selected entries, shaped like ``product.shape``, float32 (float64 for float64 inputs).
        product: from :meth:`gradsel.masks.Mask.product`.

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    if not (forms_gradients() and values.requires_grad):
        return F.linear(input, weight, bias)
    tokens = autocast_input(input).reshape(-1, input.shape[-1])
    output = _applied(_Linear, tokens, weight, bias, values, product)
    return output.view(*input.shape[:-1], weight.shape[0])


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, product: Product
    ) -> Tensor:
        ctx.save_for_backward(weight, product.keep(input))
        ctx.product = product
        return F.linear(input, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor):
        weight, kept = ctx.saved_tensors
        wants_input, _, wants_bias, _, _ = ctx.needs_input_grad
        grad_input = grad_output.mm(weight.to(grad_output.dtype)) if wants_input else None
        grad_values, grad_bias = ctx.product.weight_grad(grad_output, ctx.product.factor(kept), wants_bias)
        return grad_input, None, grad_bias, grad_values, None


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    product: Product,
    taps: Taps,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv1d``, ``conv2d`` or ``conv3d``, with gradients for ``input``, ``bias`` and ``values``.

    Args:
        input: [batch, channels, *size], or without the batch.
        weight: [rows, channels / groups, *kernel].
        bias: [rows], or None.
        values: the selected entries, as in :func:`linear`.
        product: from :meth:`gradsel.masks.Mask.product` with ``share=1``.
        taps: ``Taps.of(product, channels, kernel)``.
        stride, padding, dilation: one number for each dimension of the kernel.
        groups: blocks of channels that are convolved on their own.

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if not (forms_gradients() and values.requires_grad):
        return _CONV[len(taps.kernel)](input, weight, bias, *settings)
    if input.ndim == len(taps.kernel) + 1:
        return _applied(
            _Conv, autocast_input(input).unsqueeze(0), weight, bias, values, product, taps, settings
        ).squeeze(0)
    return _applied(_Conv, autocast_input(input), weight, bias, values, product, taps, settings)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_INPUT = {1: input_grads.conv1d_input, 2: input_grads.conv2d_input, 3: input_grads.conv3d_input}


class _Conv(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        product: Product,
        taps: Taps,
        settings: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    ) -> Tensor:
        output = _CONV[len(taps.kernel)](input, weight, bias, *settings)
        ctx.kept_as, kept = taps.keep(input, output.shape[2:], settings[:3])
        ctx.save_for_backward(weight, kept)
        ctx.product, ctx.taps, ctx.settings = product, taps, settings
        ctx.input_shape = input.shape
        return output

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor):
        weight, kept = ctx.saved_tensors
        wants_input, _, wants_bias, *_ = ctx.needs_input_grad
        grad_input = None
        if wants_input:
            backward_of_input = _CONV_INPUT[len(ctx.taps.kernel)]
            grad_input = backward_of_input(ctx.input_shape, weight.to(grad_output.dtype), grad_output, *ctx.settings)
        size = grad_output.shape[2:]
        bytes_each = max(ctx.taps.count * size.numel() * grad_output.element_size(), 1)
        at_once = max(1, TAP_BYTES // bytes_each)
        grad_values = grad_bias = None
        for first in range(0, max(len(grad_output), 1), at_once):
            part = slice(first, first + at_once)
            factor = ctx.taps.factor(kept[part], ctx.kept_as, size, ctx.settings[:3])
            values, bias = ctx.product.weight_grad(grad_output[part].flatten(2).mT, factor, wants_bias)
            grad_values = values if grad_values is None else grad_values.add_(values)
            grad_bias = bias if grad_bias is None else grad_bias.add_(bias)
        return grad_input, None, grad_bias, grad_values, None, None, None


def embedding(input: Tensor, weight: Tensor, values: Tensor, lookup: Lookup, padding_idx: int | None = None) -> Tensor:
    """``torch.nn.functional.embedding``, with gradients for ``values``.

    Args:
        input: int, any shape: the rows of ``weight`` to look up.
        weight: [tokens, dim].
        values: the selected entries, shaped like ``lookup.shape``.
        lookup: from :meth:`gradsel.masks.Mask.lookup`.
        padding_idx: a row that gets no gradient.

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    if not (forms_gradients() and values.requires_grad):
        return F.embedding(input, weight, padding_idx)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _applied(_Embedding, input, weight, values, lookup, padding_idx)


class _Embedding(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, values: Tensor, lookup: Lookup, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.lookup, ctx.padding_idx = lookup, padding_idx
        return F.embedding(input, weight, padding_idx)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor):
        (input,) = ctx.saved_tensors
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])
        return None, None, ctx.lookup.weight_grad(grad_output, input.reshape(-1), ctx.padding_idx), None, None


def harvest(weight: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """``weight`` for any use; its dense gradient is formed, the selected entries go to ``values``, the rest is dropped.

    Returns:
        An alias of ``weight`` that requires grad.

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    if not (forms_gradients() and values.requires_grad):
        return weight
    return _applied(_Harvest, weight, values, mask)


class _Harvest(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        ctx.dtype = values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor):
        dense = grad.to_dense() if grad.is_sparse else grad
        return None, ctx.mask.gather(dense).to(ctx.dtype), None


def forms_gradients() -> bool:
    """Whether gradients are formed; torch.jit.trace could neither compare nor save graphs that form those of values."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


def _applied(function: type[Function], *args: Any) -> Tensor:
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "functorch" not in str(error) and "forward mode" not in str(error):
            raise
        raise RuntimeError(
            "torch.func transforms (grad, vmap, jvp, ...) and forward-mode differentiation of an attached model are "
            "not supported: use backward() or torch.autograd.grad with respect to the values, torch.no_grad() around "
            "vmap, or the model after gradsel.detach(model)"
        ) from None


def autocast_input(input: Tensor) -> Tensor:
    """The input in the dtype that autocast would have it in, if it is on."""
    device = input.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):  # torch 2.11 cannot trace it
        return input
    if not torch.is_autocast_enabled(device):
        return input
    if input.dtype is torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(device))
