"""Which parameters of a model are PEFT's, found by the form of its modules; PEFT need not be installed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def adapter_tensors(model: nn.Module) -> dict[int, str]:
    """What adapters have added to a model or have replaced in it.

    Returns:
        By the ``id`` of each such parameter: "adapter", or "replaced" for the original of a module of which PEFT trains
        a copy (``modules_to_save``).
    """
    found: dict[int, str] = {}
    for module in model.modules():
        children = dict(module.named_children())
        if hasattr(module, "adapter_layer_names") and "base_layer" in children:
            found |= dict.fromkeys(_outside(module, "base_layer"), "adapter")
        elif {"original_module", "modules_to_save"} <= children.keys():
            found |= dict.fromkeys(_outside(module, "original_module"), "adapter")
            found |= dict.fromkeys(map(id, children["original_module"].parameters()), "replaced")
        elif "prompt_encoder" in children and hasattr(module, "peft_config"):
            found |= dict.fromkeys(map(id, children["prompt_encoder"].parameters()), "adapter")
    return found


def _outside(module: nn.Module, inner: str) -> Iterator[int]:
    """The ids of a module's parameters, without those of one of its children."""
    return (id(parameter) for name, parameter in module.named_parameters() if name.partition(".")[0] != inner)
