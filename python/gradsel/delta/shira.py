"""Deltas to and from PEFT's SHiRA adapters, by their files; PEFT need not be installed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradsel.delta.adapter_files import (
    PREFIX,
    originals_of,
    padded,
    read_adapter,
    read_parts,
    require_indices,
    sparse_parts,
    write_sparse,
)
from gradsel.delta.making import Base
from gradsel.delta.parts import Part, tensors_of


def write_shira(parts: Mapping[str, Part], folder: Path, base: Base | None, drop: bool) -> None:
    """See ``Delta.to_shira``."""
    before = {} if base is None else tensors_of(base)
    found = sparse_parts(parts, drop, "SHiRA")
    r = max(-(-part.mask.nnz // sum(part.mask.shape)) for part in found.layers.values())
    tensors: dict[str, Tensor] = {}
    for name, part in found.layers.items():
        rows, cols = part.mask.shape
        count = r * (rows + cols)  # PEFT insists on it
        if count > rows * cols:
            raise ValueError(f"{name} is too small for SHiRA with r = {r}: {count} of its {rows * cols} entries")
        every, differences = padded(part, originals_of(name, part, before), count)
        indices = torch.stack([every // cols, every % cols]).to(torch.int32)
        path = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{path}.shira_indices": indices, f"{path}.shira_weight": differences}
    config = {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",  # any type that PEFT knows; the indices in the file are used
    }
    write_sparse(folder, found, tensors, config)


def read_shira(folder: Path, base: Base) -> dict[str, Part]:
    """See ``Delta.from_shira``."""
    _, tensors = read_adapter(folder, "SHIRA", "SHiRA")

    def tuned(name: str, path: str, weight: Tensor, differences: Tensor) -> Tensor:
        return _added(name, weight, tensors.get(f"{path}.shira_indices"), differences)

    return read_parts(tensors, base, "shira_weight", (".shira_indices",), tuned)


def _added(name: str, weight: Tensor, indices: Tensor | None, differences: Tensor) -> Tensor:
    """The weight plus the differences, as PEFT merges them, in the wider of the two dtypes."""
    shape = (2, differences.numel())
    if indices is None or weight.ndim != 2 or tuple(indices.shape) != shape or differences.ndim != 1:
        raise ValueError(f"{name}: the adapter has no indices {list(shape)} for its differences")
    require_indices(name, indices, torch.tensor(weight.shape).unsqueeze(1), weight.shape)
    added = torch.zeros(math.prod(weight.shape), dtype=differences.dtype)
    added.index_add_(0, indices[0].long() * weight.shape[1] + indices[1].long(), differences)
    return weight + added.view(weight.shape)
