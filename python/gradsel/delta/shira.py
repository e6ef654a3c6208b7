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
    require_floats,
    sparse_parts,
    write_adapter,
)
from gradsel.delta.making import Base, differing
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
    tensors |= {PREFIX + name: part.values.clone() for name, part in found.beside.items()}
    config = {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",  # any type that PEFT knows; the indices in the file are used
        "target_modules": [name.removesuffix(".weight") for name in found.layers],
        "modules_to_save": sorted(found.modules) or None,
        "inference_mode": True,
    }
    write_adapter(folder, tensors, config)


def read_shira(folder: Path, base: Base) -> dict[str, Part]:
    """See ``Delta.from_shira``."""
    _, tensors = read_adapter(folder, "SHIRA", "SHiRA")
    before = tensors_of(base)
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    for key, tensor in tensors.items():
        if key.endswith(".shira_indices"):
            continue
        path, _, last = key.rpartition(".")
        name = f"{path}.weight" if last == "shira_weight" else key
        if name in seen:
            raise ValueError(f"the adapter sets {name} twice")
        seen.add(name)
        require_floats(name, tensor, before)
        tuned = tensor
        if last == "shira_weight":
            tuned = _added(name, before[name], tensors.get(f"{path}.shira_indices"), tensor)
        part = differing(name, before[name].detach().cpu(), tuned.to(before[name].dtype))
        if part is not None:
            parts[name] = part
    return parts


def _added(name: str, weight: Tensor, indices: Tensor | None, differences: Tensor) -> Tensor:
    """The weight plus the differences, as PEFT merges them, in the wider of the two dtypes."""
    shape = (2, differences.numel())
    if indices is None or weight.ndim != 2 or tuple(indices.shape) != shape or differences.ndim != 1:
        raise ValueError(f"{name}: the adapter has no indices {list(shape)} for its differences")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: the adapter has indices in {indices.dtype}, expected torch.int32 or torch.int64")
    limits = torch.tensor(weight.shape).unsqueeze(1)
    if bool((indices < 0).any()) or bool((indices >= limits).any()):
        raise ValueError(f"{name}: the adapter has indices outside {list(weight.shape)}")
    added = torch.zeros(math.prod(weight.shape), dtype=differences.dtype)
    added.index_add_(0, indices[0].long() * weight.shape[1] + indices[1].long(), differences)
    return weight.detach().cpu() + added.view(weight.shape)
