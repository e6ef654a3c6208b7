"""Every method of the comparison as it is applied to a model: parameter-efficient baselines, full fine-tuning, ours.

Linear probe, bias, SSF, VPT and adapters are those of :mod:`gradsel.methods`, with 64 hidden units for adapters and 50
prompts for VPT-Deep, as in the cost figures of SSF and GPS. Whatever a method does not train requires no gradient, so
that autograd computes and keeps no more than the method needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW

from gradsel.experiments.cost.contenders import RATE, Contender, Method, Task
from gradsel.methods import SSF, Adapter, Bias, Context, Linear, VPTDeep
from gradsel.methods import Method as AnyMethod
from gradsel.nn import attach, detach, trainable_parameters
from gradsel.optim import MaskedAdam, anchored_groups
from gradsel.parameters.names import strings
from gradsel.ranking import Columns, PerNeuron, Rows
from gradsel.selection import freeze

Build = Callable[[nn.Module], Contender]


def adamw(parameters: Iterable[nn.Parameter]) -> AdamW:
    return AdamW(parameters, RATE, fused=True)


def floor(task: Task) -> Build:
    """Forward, and the gradient of every layer's input down to the first layers that ours trains, and nothing else."""

    def build(model: nn.Module) -> Contender:
        model.requires_grad_(False)
        for name in task.entrances:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output.requires_grad_())
        return Contender(model, task.loss)

    return build


def full(task: Task) -> Build:
    """All parameters; torch's fused AdamW."""
    return lambda model: Contender(model, task.loss, adamw(model.parameters()))


def added(task: Task, how: AnyMethod) -> Build:
    """A method of the library that ranks nothing, with torch's fused AdamW like the others."""

    def build(model: nn.Module) -> Contender:
        how.prepare(model, None, Context(head=strings(task.head or ())))
        return Contender(model, task.loss, adamw(trainable_parameters(model)), merge=how.merge)

    return build


def lora(task: Task, rank: int = 8, autocast: torch.dtype | None = None, exact: bool = True) -> Build:
    """LoRA (Hu et al., ICLR 2022) by PEFT, on every linear layer of the blocks, without dropout.

    Args:
        autocast: for models in half precision, whose adapters PEFT makes float32.
        exact: keep them float32; otherwise adapters get the dtype of the model, which is faster.
    """

    def build(model: nn.Module) -> Contender:
        import peft

        saved = None if task.head is None else [task.head]
        config = peft.LoraConfig(r=rank, lora_dropout=0.0, target_modules=task.layers, modules_to_save=saved)
        adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=exact)
        contender = Contender(adapted, task.loss, adamw(trainable_parameters(adapted)), autocast=autocast)
        contender.merge = merged
        return contender

    return build


def merged(adapted: Any) -> nn.Module:
    return adapted.merge_and_unload()


# --- GPS and GRFT ------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def published(task: Task, policy: Any) -> Build:
    """GPS as its published code trains: dense Adam on dense gradients that are multiplied by dense masks."""

    def build(model: nn.Module) -> Contender:
        selection = task.select(device_of(model), policy)
        freeze(model, selection)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        masked = [(p, selection[name].to_dense().to(p.dtype)) for name, p in named if not selection[name].is_whole]

        def mask() -> None:
            for parameter, dense in masked:
                if parameter.grad is not None:
                    parameter.grad.mul_(dense)

        optimizer = Adam([parameter for _, parameter in named], RATE, fused=True)
        return Contender(model, task.loss, optimizer, mask, selection=selection)

    return build


def detached(model: nn.Module) -> nn.Module:
    detach(model)
    return model


def ours(task: Task, policy: Any, criterion: str = "gradient", pull: float = 0.0) -> Build:
    """Attached, with MaskedAdam; ``pull`` is GRFT's to the pre-trained weights."""

    def build(model: nn.Module) -> Contender:
        selection = task.select(device_of(model), policy, criterion)
        attach(model, selection)
        trained: Any = trainable_parameters(model)
        if pull:
            trained = anchored_groups(model, pull, task.regular_blocks)
        return Contender(model, task.loss, MaskedAdam(trained, RATE), merge=detached, selection=selection)

    return build


# --- All of them -------------------------------------------------------------------------------------------------

LORA, FULL = "LoRA", "full fine-tuning"  # what others are compared with
PUBLISHED, OURS = "GPS as published", "GPS, attached"
SERVED = OURS, "GPS, detached"
PULL = 1e-4
DENSE = "weights, gradients and Adam's moments in bfloat16"


def generic(task: Task, dtype: torch.dtype, ks: tuple[int, ...]) -> list[Method]:
    """The methods that work on any model, the most important ones first."""
    half = dtype is not torch.float32
    dense, exact = (DENSE, "selected values in float32") if half else ("", "")
    pulled = ", ".join(filter(None, (exact, f"pull {PULL:g}")))
    return [
        Method(FULL, 0, full(task), (FULL, None), dense),
        *loras(task, dtype),
        *(Method(OURS, k, ours(task, PerNeuron(k)), SERVED if k == 1 else (None, None), exact) for k in ks),
        Method("GRFT rows, attached", 3, ours(task, Rows(3), pull=PULL), note=pulled),
        Method("GRFT columns, attached", 3, ours(task, Columns(3), pull=PULL), note=pulled),
        Method("random, attached", 1, ours(task, PerNeuron(1), "random"), note=exact),
        Method(PUBLISHED, 1, published(task, PerNeuron(1)), note=dense),
        Method("floor", 0, floor(task), note="forward and input gradients only"),
    ]


def loras(task: Task, dtype: torch.dtype) -> list[Method]:
    """LoRA as PEFT and transformers' Trainer do it; in half precision also in a faster way."""
    if dtype is torch.float32:
        return [Method(LORA, 8, lora(task), ("LoRA, unmerged", "LoRA, merged"))]
    usual = "weights in bfloat16, adapters in float32 under autocast, as PEFT and Trainer do"
    name = f"{LORA}, bfloat16 adapters"
    return [
        Method(LORA, 8, lora(task, autocast=dtype), ("LoRA, unmerged", "LoRA, merged"), usual),
        Method(name, 8, lora(task, exact=False), (f"{name}, unmerged", None), "no autocast"),
    ]


def for_vit(task: Task, dtype: torch.dtype, ks: tuple[int, ...] = (1, 2, 10)) -> list[Method]:
    """The generic methods, and those that are written for our vision transformer."""
    note = DENSE if dtype is not torch.float32 else ""
    return [
        *generic(task, dtype, ks),
        Method("linear probe", 0, added(task, Linear()), note=note),
        Method("bias", 0, added(task, Bias()), note=note),
        Method("SSF", 0, added(task, SSF()), ("SSF, unmerged", "SSF, merged"), note),
        Method("VPT-Deep", 50, added(task, VPTDeep(prompts=50)), ("VPT-Deep", None), note),
        Method("adapter (Houlsby)", 64, added(task, Adapter(64, "both")), ("adapter (Houlsby)", None), note),
        Method("adapter (Pfeiffer)", 64, added(task, Adapter(64)), ("adapter (Pfeiffer)", None), note),
    ]
