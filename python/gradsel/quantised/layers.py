"""Quantised Linear layers whose weight is trained in part: y = (dequantised(W) + differences) x + b.

The weight is made dense for each product, gets the differences at its selected entries, and is freed again, in forward
and in backward. A product of its own for the sparse differences would cost time for each token and selected entry;
adding them costs once for each entry (figures: docs/quantised.md). Inference on few tokens is another matter: there the
library multiplies without a dense weight, and the sparse product is added to the result.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gradsel.masks import Mask
from gradsel.masks.weight_grad import once
from gradsel.quantised.finding import require_known
from gradsel.quantised.formats import Quantised
from gradsel.views import NeuronView


def linear(
    input: Tensor, weight: Quantised, bias: Tensor | None, values: Tensor | None, mask: Mask | None, product: Any
) -> Tensor:
    """What a quantised layer computes, with gradients for ``input``, ``bias`` and ``values``.

    Args:
        input: [..., in].
        weight: [out, in], which stays quantised and gets no gradient.
        bias: [out], or None.
        values: the differences at the selected entries in mask order, in float32; or, without a mask, a tensor
            [out, in] that is not read and gets the dense gradient of the weight; or None.
        mask: the selected entries.
        product: from :meth:`gradsel.masks.Mask.product`, with a mask.

    Returns:
        [..., out].

    Raises:
        RuntimeError: backward is differentiated a second time.
    """
    dtype, device = weight.compute_dtype(input), input.device.type
    tokens = input.reshape(-1, input.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        output = _inferred(tokens, bias, values, weight, mask, product)
        if output is None:
            output = _Linear.apply(tokens, bias, values, weight, mask, product)
    output = output.view(*input.shape[:-1], weight.shape[0])
    return output.to(input.dtype) if weight.returns_input_dtype else output


def _inferred(
    tokens: Tensor, bias: Tensor | None, values: Tensor | None, weight: Quantised, mask: Mask | None, product: Any
) -> Tensor | None:
    """The output in ``eval()`` mode without gradients, if that is to be had without a dense weight."""
    if weight.module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if values is None or mask is None or len(tokens) * mask.nnz > mask.numel:
        return None  # the sparse product would take more multiplications than the weight has entries
    output = weight.multiply(tokens)
    if output is None:
        return None
    product.add_to(output, tokens, values)
    return output if bias is None else output.add_(bias)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, values: Tensor | None, weight: Quantised, mask: Any, product: Any
    ) -> Tensor:
        kept = None
        if ctx.needs_input_grad[2]:
            kept = input if mask is None else product.keep(input)
        ctx.save_for_backward(kept, values if mask is not None else None)
        ctx.weight, ctx.mask, ctx.product = weight, mask, product
        return F.linear(input, with_differences(weight, input.dtype, mask, values), bias)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor):
        kept, values = ctx.saved_tensors
        wants_input, wants_bias, wants_values, *_ = ctx.needs_input_grad
        grad_input = grad_bias = grad_values = None
        if wants_input:
            grad_input = grad_output.mm(with_differences(ctx.weight, grad_output.dtype, ctx.mask, values))
        if wants_values and ctx.mask is not None:
            grad_values, grad_bias = ctx.product.weight_grad(grad_output, ctx.product.factor(kept), wants_bias)
        elif wants_values:
            grad_values = grad_output.mT.mm(kept)
        if wants_bias and grad_bias is None:
            grad_bias = grad_output.sum(0)
        return grad_input, grad_bias, grad_values, None, None, None


def with_differences(weight: Quantised, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor:
    """The dense weight, a new tensor; sums at the selected entries are rounded to its dtype once."""
    dense = weight.dense(dtype)
    if mask is not None and values is not None:
        with torch.no_grad():
            mask.scatter_(dense, mask.gather(dense) + values)
    return dense


class Forward:
    """The forward of a quantised layer, as an attribute of the module.

    Args:
        module: the layer.
        name: of its weight, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.name = name

    def __call__(self, input: Tensor) -> Tensor:
        values, mask, product = self.trained(input.device)
        return linear(input, require_known(self.module, self.name), self.module.bias, values, mask, product)

    def trained(self, device: torch.device) -> tuple[Tensor | None, Mask | None, Any]:
        """The values, the mask and the product of :func:`linear`."""
        raise NotImplementedError


class Fixed(Forward):
    """That of a layer with differences of a delta, which are not trained."""

    def __init__(self, module: nn.Module, name: str, mask: Mask, values: Tensor) -> None:
        super().__init__(module, name)
        self.mask, self.values, self.product = mask, values, mask.product(NeuronView())

    def trained(self, device: torch.device) -> tuple[Tensor | None, Mask | None, Any]:
        if self.values.device != device:
            self.mask, self.values = self.mask.to(device), self.values.to(device)
            self.product = self.mask.product(NeuronView())
        return self.values, self.mask, self.product


class Ranked(Forward):
    """That of a layer the dense gradient of whose weight is ranked."""

    def __init__(self, module: nn.Module, name: str, stand_in: Tensor) -> None:
        super().__init__(module, name)
        self.stand_in = stand_in

    def trained(self, device: torch.device) -> tuple[Tensor | None, Mask | None, Any]:
        return self.stand_in, None, None


def install(module: nn.Module, forward: Forward) -> None:
    """Makes a layer use this forward, inside the one that accelerate has put around it, if it has."""
    own = vars(module)
    own["_old_forward" if "_old_forward" in own else "forward"] = forward


def uninstall(module: nn.Module) -> None:
    """Gives a layer the forward of its class back."""
    own = vars(module)
    if isinstance(own.get("forward"), Forward):
        del own["forward"]
    if isinstance(own.get("_old_forward"), Forward):
        own["_old_forward"] = type(module).forward.__get__(module)


def installed(module: nn.Module) -> Forward | None:
    """The forward that :func:`install` has given to a layer."""
    for slot in ("forward", "_old_forward"):
        found = vars(module).get(slot)
        if isinstance(found, Forward):
            return found
    return None
