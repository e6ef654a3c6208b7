"""Settings in which an attached model trains, other than float32 on the CPU: dtypes, autocast, compiled, offloaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn


@dataclass
class Setting:
    """
    Attributes:
        dtype: of the model.
        rtol, atol: how far gradients may be from those of the plain model, relative to themselves and to the largest
            of a parameter.
        least: likewise, absolutely.
        context: around every forward.
        wrap: makes the model that is called. It may change the given one.
        scale: of the loss, by a GradScaler.
    """

    dtype: torch.dtype = torch.float32
    rtol: float = 0.0
    atol: float = 0.0
    least: float = 0.0
    context: Callable[[], Any] = nullcontext
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    scale: float | None = None

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=self.scale or 1.0, enabled=self.scale is not None)


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compiled_in_place(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    model.compile(backend="eager", fullgraph=True)
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager", fullgraph=True)
    return model


def compiled_blocks_in_place(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


#: The ways to compile a model, or its blocks.
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": compiled,
    "model.compile()": compiled_in_place,
    "torch.compile(block)": compiled_blocks,
    "block.compile()": compiled_blocks_in_place,
}


def offloaded(model: nn.Module) -> nn.Module:
    """On the CPU between two steps; on a machine without a GPU, also during them."""
    return pytest.importorskip("accelerate").cpu_offload_with_hook(model, execution_device="cpu")[0]


#: Gradients of the plain model are rounded to the dtype in which they are formed, and those of values are not. torch
#: adds up the float16 gradients of convolutions in float16.
BFLOAT16, FLOAT16 = {"rtol": 2**-8}, {"rtol": 2**-11, "atol": 2**-10, "least": 2**-24}
SETTINGS = {
    "bf16": Setting(torch.bfloat16, **BFLOAT16),
    "fp16": Setting(torch.float16, **FLOAT16),
    "autocast to bfloat16": Setting(context=lambda: torch.autocast("cpu", torch.bfloat16), **BFLOAT16),
    "autocast to float16": Setting(context=lambda: torch.autocast("cpu", torch.float16), scale=2.0**10, **FLOAT16),
    "offload": Setting(torch.float64, atol=1e-14, wrap=offloaded),
    "torch.compile": Setting(torch.float64, atol=1e-14, wrap=compiled),
}
