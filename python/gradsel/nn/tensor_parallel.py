"""Attached layers under tensor parallelism (``torch.distributed.tensor.parallel.parallelize_module``).

Their weights are DTensors in forward, too. Nothing is done to the parameter. For the time of its module's forward, the
module has an attribute of the same name, which hands gradients on to the values. Linear layers compute the gradient of
this rank's selected entries only. Other layers form the dense gradient of this rank's part, and keep those of it.

torch.compile traces all of it, except for what :func:`expect` computes before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gradsel.attached import Selected
from gradsel.masks.weight_grad import once
from gradsel.nn.functional import autocast_input
from gradsel.nn.lending import expect_loans, lend
from gradsel.sharding import Part, is_sharded, mesh_of, settled


def expect(module: nn.Module, selected: Selected, weight: Tensor) -> None:
    """Prepares forwards that read a weight, for torch.compile, which traces neither registrations nor sizes in data.

    Args:
        weight: a DTensor, as the forward will see it.
    """
    shards = selected.shards
    assert shards is not None
    expect_loans(module)
    part = shards.part_of(weight)
    if "linear" in selected.direct:
        _ = part.product  # is kept
    if mesh_of(shards.both[0]) != part.mesh:
        shards.reduction(part.mesh)


def hand_out(module: nn.Module, short: str, selected: Selected, weight: Tensor) -> None:
    """Lets the forward that is about to begin read a weight by which it is differentiated.

    Args:
        weight: the module's parameter, a DTensor that agrees with its values.
    """
    shards, values = selected.shards, selected.values()
    assert shards is not None
    assert values is not None
    if not torch.is_grad_enabled():
        return
    part = shards.part_of(weight)
    if mesh_of(shards.both[0]) != part.mesh:
        values = shards.in_forward(values, part.mesh)  # FSDP averages, if it does not know the values
    given: Any
    if "linear" in selected.direct and torch.compiler.is_dynamo_compiling():
        alone = type(module).forward is nn.Linear.forward  # which asks its weight for nothing else
        given = LinearArgument(weight, values, part) if alone else _harvest(weight, values, part)
    elif "linear" in selected.direct:
        given = weight.detach()
        given.__class__ = _linear_weight()
        vars(given).update(_weight=weight.detach(), _values=values, _part=part)
    else:
        given = _harvest(weight, values, part)
    lend(module, short, given)


def _linear_weight() -> type:
    """The class of what a Linear layer reads as its weight. torch.distributed is imported where it is in use."""
    global _LINEAR_WEIGHT
    if _LINEAR_WEIGHT is None:
        from torch.distributed.tensor import DTensor

        class LinearWeight(DTensor):
            """A weight that the direct route reads; whatever else reads it gets a dense gradient first."""

            @classmethod
            def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
                kwargs = kwargs or {}
                with torch._C.DisableTorchFunctionSubclass():
                    if func is F.linear and (output := _linear(*args, **kwargs)) is not None:
                        return output
                    return func(*map(_dense, args), **{key: _dense(value) for key, value in kwargs.items()})

        _LINEAR_WEIGHT = LinearWeight
    return _LINEAR_WEIGHT


_LINEAR_WEIGHT: type | None = None


def _dense(given: Any) -> Any:
    if type(given) is not _LINEAR_WEIGHT:
        return given
    own = vars(given)
    return _harvest(own["_weight"], own["_values"], own["_part"])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The direct route; None if it cannot be taken."""
    if type(weight) is not _LINEAR_WEIGHT or not torch.is_grad_enabled():
        return None
    own = vars(weight)
    return _direct(input, bias, own["_weight"], own["_values"], own["_part"])


def _direct(input: Tensor, bias: Tensor | None, weight: Tensor, values: Tensor, part: Part) -> Tensor | None:
    outputs = part.factors(input) if is_sharded(input) else None
    return None if outputs is None else _Linear.apply(autocast_input(input), weight, bias, values, part, outputs)


class LinearArgument:
    """What ``torch.nn.functional.linear`` gets for a weight under torch.compile, which makes no LinearWeight."""

    def __init__(self, weight: Tensor, values: Tensor, part: Part) -> None:
        self.weight, self.values, self.part = weight, values, part

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        input, own, bias = args
        output = _direct(input, bias, own.weight, own.values, own.part)
        return func(input, _harvest(own.weight, own.values, own.part), bias) if output is None else output


class _Linear(Function):
    """``torch.nn.functional.linear`` of DTensors, as :func:`gradsel.nn.functional.linear` is of tensors."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, part: Part, outputs: list
    ) -> Tensor:
        tokens = settled(input)
        ctx.save_for_backward(weight, part.product.keep(tokens.reshape(-1, tokens.shape[-1])), values)
        ctx.part, ctx.outputs = part, outputs
        return F.linear(input, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Any):
        weight, kept, values = ctx.saved_tensors
        wants_input, _, wants_bias, *_ = ctx.needs_input_grad
        grad_output = grad_output.redistribute(ctx.part.mesh, ctx.outputs)
        grad_input = grad_output.matmul(weight.to(grad_output.dtype)) if wants_input else None
        grad_bias = grad_output.sum(tuple(range(grad_output.ndim - 1))) if wants_bias else None
        own = settled(grad_output)
        product = ctx.part.product
        if ctx.part.holds_any:
            entries, _ = product.weight_grad(own.reshape(-1, own.shape[-1]), product.factor(kept), False)
        else:
            entries = own.new_empty(product.shape)
        grad_values = ctx.part.grad_of_values(entries.to(values.dtype), weight, values)
        return grad_input, None, grad_bias, grad_values, None, None


def _harvest(weight: Tensor, values: Tensor, part: Part) -> Tensor:
    return _Harvest.apply(weight.detach(), values, part) if values.requires_grad else weight.detach()


class _Harvest(Function):
    """An alias of a DTensor. Of its dense gradient, the selected entries go to the values; the rest is dropped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, part: Part) -> Tensor:
        ctx.save_for_backward(weight, values)
        ctx.part = part
        return weight.detach()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Any):
        weight, values = ctx.saved_tensors
        dense = settled(grad.redistribute(ctx.part.mesh, ctx.part.placements))
        entries = ctx.part.share.mask.gather(dense).to(values.dtype)
        return None, ctx.part.grad_of_values(entries, weight, values), None
