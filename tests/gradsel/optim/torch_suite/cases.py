"""The checks that torch puts its own optimizers through (class TestOptimRenewed of its test suite), rewritten for ours.

They use torch's inputs, errors and schedulers for Adam, and run on MaskedAdam and MaskedAdamW without masks and on a
MaskedAdam that trains every other entry. docs/optimizer.md lists them, and says which ones do not apply.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)

import gradsel
from gradsel.masks import Whole, from_dense

CPU = torch.device("cpu")


class HalfAdam(gradsel.MaskedAdam):
    """Trains every other entry of each parameter that it is given."""

    def add_param_group(self, param_group):
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        taken = sum(len(group["params"]) for group in self.param_groups)
        named = [p if isinstance(p, tuple) else (f"p{taken + i}", p) for i, p in enumerate(given)]
        masks = {name: half(p.shape) for name, p in named}
        super().add_param_group({**param_group, "params": named, "masks": masks})


def half(shape):
    if shape.numel() < 2:
        return Whole(shape)
    return from_dense((torch.arange(shape.numel()) % 2 == 0).view(shape))


CLASSES = [gradsel.MaskedAdam, gradsel.MaskedAdamW, HalfAdam]
SCHEDULERS = next(info.scheduler_inputs for info in optim_db if info.optim_cls is torch.optim.Adam)
FLAGS = ("foreach", "differentiable", "fused", "maximize", "capturable", "decoupled_weight_decay")


def info_of(cls):
    return OptimizerInfo(
        cls,
        optim_inputs_func=optim_inputs_func_adam,
        optim_error_inputs_func=optim_error_inputs_func_adam,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
        supports_complex=False,
    )


def all_inputs():
    """torch's inputs for Adam, each with foreach and fused."""
    return _get_optim_inputs_including_global_cliquey_kwargs(CPU, torch.float32, info_of(gradsel.MaskedAdam))


each_class = pytest.mark.parametrize("cls", CLASSES)
each_input = pytest.mark.parametrize("kwargs", [i.kwargs for i in all_inputs()], ids=[i.desc for i in all_inputs()])


def problem(seed=0, dtype=torch.float32):
    """A weight, a bias, and a loss that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = Parameter(torch.randn(10, 5, generator=generator)), Parameter(torch.randn(10, generator=generator))
    input = torch.randn(5, generator=generator)
    weight, bias, input = (t.detach().to(dtype) for t in (weight, bias, input))
    weight, bias = Parameter(weight), Parameter(bias)

    def loss():
        return (weight.mv(input) + bias).pow(2).sum()

    return [weight, bias], loss


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def steps(optimizer, loss, count=1):
    for _ in range(count):
        optimizer.step(closure_of(optimizer, loss))
