"""Which layers take the direct route, and what it needs of a mask."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradsel.masks import Mask
from gradsel.masks.weight_grad import Taps
from gradsel.parameters.rules import is_transposed_linear
from gradsel.views import NeuronView

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def direct_route(module: nn.Module, short: str) -> str | None:
    """The direct route of a module's parameter, or None for the harvest.

    What a forward of the module's own, or of a subclass, does with the weight is not known.
    """
    forward: Any = type(module).forward
    if short != "weight" or "forward" in vars(module):
        return None
    if forward is nn.Linear.forward and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "linear"  # the exception is never called: MultiheadAttention reads its weight
    for known in _CONVOLUTIONS:
        if forward is known.forward and type(module)._conv_forward is known._conv_forward:  # type: ignore[attr-defined]
            return "conv"
    if is_transposed_linear(module) and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return None if module.scale_grad_by_freq or module.sparse else "embedding"
    return None


def needed_by(module: nn.Module, route: str, mask: Mask) -> Any:
    """What the functions of :mod:`gradsel.nn.functional` need to train a module's weight by ``mask``."""
    if route == "embedding":
        return mask.lookup()
    if route == "conv":
        convolution: Any = module
        product = mask.product(NeuronView(), convolution.groups, share=1.0)
        return product, Taps.of(product, convolution.in_channels, convolution.kernel_size, mask.device)
    return mask.product(NeuronView((1,) if route == "conv1d" else (0,)))
