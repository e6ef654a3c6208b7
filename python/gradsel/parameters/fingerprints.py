"""Fingerprints of weights, by which a selection recognises the model it was made on."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from gradsel.dtypes import integer_sum
from gradsel.masks import Flat
from gradsel.parameters.names import shaped_parameters
from gradsel.parameters.trainable import has_memory
from gradsel.quantised import StandIn
from gradsel.sharding import entries_of, is_sharded, local_of, sum_over_shards
from gradsel.tables import shape_text

#: Number of entries of a parameter that go into its fingerprint individually.
_SAMPLE = 256
#: The integer type that holds the bits of an entry, by its size in bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(parameter: Tensor) -> str:
    """Shape, dtype and a hash of the values, such as ``768x3072 float32 5f0c8e1d9ab37264``.

    The hash covers the sum of all entries' bits, read as integers, and up to 256 single entries. A changed value shows
    in the sum; swapped values show only if one is among the single entries. The device and memory format do not matter.

    Args:
        parameter: any shape, dtype and strides. The fingerprint of a DTensor is that of the whole; all ranks call it.
            That of the stand-in for a quantised weight is made of its codes and scales.
    """
    if isinstance(parameter, StandIn):
        return parameter.quantised.fingerprint()
    numel = parameter.numel()
    count = min(numel, _SAMPLE)
    places = torch.arange(count, device=parameter.device) * numel // max(count, 1)
    if is_sharded(parameter):
        picked = Flat(places, parameter.shape)
        sample = entries_of(picked, parameter).cpu()
    else:
        sample = parameter.detach()[torch.unravel_index(places, parameter.shape)].reshape(-1).cpu()
    content = hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8)
    if (integers := INTEGERS.get(parameter.element_size())) is not None:
        total = integer_sum(local_of(parameter).detach().view(integers))
        if is_sharded(parameter):
            total = int(sum_over_shards(torch.tensor(total, device=parameter.device), parameter))
        content.update(str(total).encode())
    return f"{kind_of(parameter)} {content.hexdigest()}"


def kind_of(parameter: Tensor) -> str:
    """Shape and dtype, or the format of a quantised weight, as at the start of a fingerprint."""
    stored_as = parameter.quantised.kind if isinstance(parameter, StandIn) else str(parameter.dtype)
    return f"{shape_text(parameter.shape)} {stored_as.removeprefix('torch.')}"


def fingerprints(model: nn.Module) -> dict[str, str]:
    """The fingerprints of all parameters, by name without the prefixes of DistributedDataParallel and torch.compile."""
    return {
        name: fingerprint(p)
        for name, p in shaped_parameters(model).items()
        if isinstance(p, StandIn) or has_memory(local_of(p))
    }
