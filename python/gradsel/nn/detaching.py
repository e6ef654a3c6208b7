"""detach(): the model as it was before attach(), with trained entries or without."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from gradsel.attached import (
    LINK,
    RECORD,
    STATE,
    SUFFIX,
    Attachments,
    SelectedValues,
    attachments_of,
    differences_in,
    require_complete,
    require_present,
)
from gradsel.interrupts import uninterrupted
from gradsel.nn.attaching import sync
from gradsel.nn.buffers import BUFFERS, restore_buffers
from gradsel.nn.hooks import unhook
from gradsel.nn.sharding import detach_shards, require_own_shards, restore_whole
from gradsel.quantised import uninstall
from gradsel.sharding import reshard

Model = TypeVar("Model", bound=nn.Module)


def detach(model: Model, restore: bool = False) -> Model:
    """Takes back what :func:`attach` did: parameters and ``requires_grad`` flags are as before. In place.

    Args:
        model: the attached model, or a wrapper around it. All ranks call it for a sharded one, which stays sharded.
        restore: give every trained parameter its original entries back, to the bit, and every buffer (running
            statistics) what it held; otherwise they stay as trained. A quantised weight cannot take its differences
            over: see :func:`gradsel.merge`.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not attached, or was attached before ``fully_shard()``, or accelerate has offloaded it;
            with ``restore``, a trained parameter is no longer part of it; without it, quantised weights have
            differences that would be lost. Nothing has changed.
    """
    roots = [module for module in model.modules() if RECORD in vars(module)]
    if not roots:
        raise ValueError("the model is not attached, or attach() was called on a module around it; pass that one")
    for root in roots:
        require_own_shards(root)
        require_present(root)
        if vars(root)[RECORD].sharded:
            reshard(root)
    if restore:
        for root in roots:
            require_complete(root, "detach(restore=True)")
    else:
        _require_no_differences(roots)
    sync(model, writing=False)
    with uninterrupted():
        for root in roots:
            if restore:
                restore_buffers(root)
            vars(root).pop(BUFFERS, None)
            for module in root.modules():
                attachments = attachments_of(module)
                if attachments is not None:
                    _detach_module(module, attachments, restore)
            unhook(root)
            delattr(root, RECORD)
    return model


def _require_no_differences(roots: list[nn.Module]) -> None:
    lost = {
        differences.name
        for root in roots
        for module in root.modules()
        for differences in differences_in(module).values()
        if (values := differences.values()) is not None and bool(values.any())
    }
    if lost:
        raise ValueError(
            f"{len(lost)} quantised weights have been trained, first {min(lost)}, and cannot take over their "
            "differences: gradsel.save_delta(model, path) keeps them, gradsel.merge(model, torch.bfloat16) writes them "
            "to a dense model; detach(model, restore=True) drops them"
        )


def _detach_module(module: nn.Module, attachments: Attachments, restore: bool) -> None:
    own = module._parameters
    for short, original in attachments.whole.items():
        if restore and (parameter := own.get(short)) is not None:
            restore_whole(parameter, original.entries)
    for short, selected in attachments.partial.items():
        weight, values = selected.weight(), own.pop(short + SUFFIX, None)
        if weight is not None and selected.shards is not None:
            detach_shards(selected, weight, restore)
            weight.requires_grad_(attachments.flags[short])
        elif weight is not None:
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                if restore:
                    selected.mask.scatter_(weight, selected.entries)
            vars(weight).pop(LINK, None)
            weight.__class__ = selected.kind
            weight.requires_grad_(attachments.flags[short])
        if isinstance(values, SelectedValues):
            vars(values).pop(LINK, None)
            values.__class__ = nn.Parameter  # type: ignore[assignment]
    for short in attachments.differences:
        own.pop(short + SUFFIX, None)
        uninstall(module)
    for short, flag in attachments.flags.items():
        if (parameter := own.get(short)) is not None:
            parameter.requires_grad_(flag)
    unhook(module)
    delattr(module, STATE)
