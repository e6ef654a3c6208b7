"""A Linear whose weight is a frozen one plus values at some of its entries, for the time of a product only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from gradsel.masks.weight_grad import Product, once
from gradsel.nn.functional import autocast_input


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Sequence[Tensor],
    places: Sequence[Tensor],
    products: Sequence[Product],
) -> Tensor:
    """``F.linear(input, weight + values at places, bias)``, with gradients for ``input``, ``bias`` and ``values``.

    The sum is formed in the memory of ``weight``, and every bit of it is restored before this function or its backward
    returns. Neither a copy of the weight nor a dense gradient of it is made.

    Args:
        input: [..., in].
        weight: [out, in], contiguous, without gradient; nothing else may use it meanwhile.
        bias: [out], or None.
        values: one vector for each adapter.
        places: int64, for each adapter, the row-major indices of its values in the weight.
        products: for each adapter, how the gradient of its values is computed.

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    tokens = autocast_input(input).reshape(-1, input.shape[-1])
    output = _Linear.apply(tokens, weight, bias, tuple(places), tuple(products), *values)
    return output.view(*input.shape[:-1], weight.shape[0])


@contextmanager
def _composed(weight: Tensor, places: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The weight with the values added to it inside the block; afterwards as it was, to the bit."""
    flat = weight.detach().view(-1)
    kept: list[Tensor] = []
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        try:
            for own, added in zip(places, values, strict=True):
                kept.append(flat.index_select(0, own))
                flat.index_copy_(0, own, kept[-1] + added.to(flat.dtype))
            yield
        finally:
            for own, entries in reversed(list(zip(places, kept, strict=False))):  # adapters may share entries
                flat.index_copy_(0, own, entries)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: tuple[Tensor, ...],
        products: tuple[Product, ...],
        *values: Tensor,
    ) -> Tensor:
        kept = [product.keep(input) for product in products]
        ctx.save_for_backward(weight, *values, *kept)
        ctx.places, ctx.products = places, products
        with _composed(weight, places, values):
            return F.linear(input, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor):
        count = len(ctx.places)
        weight, *saved = ctx.saved_tensors
        values, kept = saved[:count], saved[count:]
        wants_input, _, wants_bias, _, _, *wants = ctx.needs_input_grad
        grad_input = None
        if wants_input:
            with _composed(weight, ctx.places, values):
                grad_input = grad_output.mm(weight.to(grad_output.dtype))
        grad_bias = grad_output.sum(0) if wants_bias else None
        grads = [
            product.weight_grad(grad_output, product.factor(own), False)[0].to(value.dtype) if wanted else None
            for product, own, value, wanted in zip(ctx.products, kept, values, wants, strict=True)
        ]
        return grad_input, None, grad_bias, None, None, *grads
