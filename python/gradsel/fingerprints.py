"""Fingerprints of weights, by which a selection knows the model it was made on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from gradsel.rules import strip_wrappers
from gradsel.tables import shape_text

#: Entries of a parameter that go into its fingerprint.
_SAMPLE = 256


def fingerprint(parameter: Tensor) -> str:
    """Shape, dtype and a hash of evenly spaced entries, such as ``768x3072 float32 5f0c8e1d9ab37264``.

    The same on every device and in every memory format. It tells other weights, trained ones for example, from these,
    but not a change of single entries.

    Args:
        parameter: any shape, dtype and strides. At most 256 of its entries are read.
    """
    numel = parameter.numel()
    count = min(numel, _SAMPLE)
    places = torch.arange(count, device=parameter.device) * numel // max(count, 1)
    sample = parameter.detach()[torch.unravel_index(places, parameter.shape)].reshape(-1).cpu()
    digest = hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
    return f"{kind_of(parameter)} {digest}"


def kind_of(parameter: Tensor) -> str:
    """Shape and dtype, what a fingerprint begins with."""
    return f"{shape_text(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Of all parameters of a model, by name without the prefixes of DistributedDataParallel and torch.compile."""
    return {strip_wrappers(name): fingerprint(parameter) for name, parameter in model.named_parameters()}
