"""Small models of real families, randomly initialised, with what is expected of each.

The tests that use the zoo are written once and run on every model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from tests.support.families import Family, noise
from tests.support.zoo_language import LANGUAGE_MODELS
from tests.support.zoo_layers import LAYERS
from tests.support.zoo_vision import VISION_MODELS

ZOO: dict[str, Family] = VISION_MODELS | LANGUAGE_MODELS | LAYERS


@cache
def built(name: str) -> nn.Module:
    """The model in eval mode, with noise for parameters, scaled to let gradients through; callers must not change it.

    Some models start with zeros, with layer scales of 1e-6, or, SAM's encoder, with weights of 1e-10.
    """
    torch.manual_seed(0)
    model = ZOO[name].make().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            spread = noise(number, *parameter.shape)
            parameter.copy_(1 + 0.1 * spread if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.3 * spread)
    return model
