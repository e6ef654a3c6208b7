"""Deltas to and from PEFT's Super-Tuning adapters, by their files; PEFT need not be installed.

An adapter has flat indices and differences for each layer (peft/tuners/supertuning/layer.py), and may have a LoRA
beside them ("Supra").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_DOWN, _UP = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def write_supertuning(parts: Mapping[str, Part], folder: Path, base: Base | None, drop: bool) -> None:
    """See ``Delta.to_supertuning``."""
    before = {} if base is None else tensors_of(base)
    found = sparse_parts(parts, drop, "Super-Tuning")
    sparsity = _sparsity([(part.mask.nnz, part.mask.numel) for part in found.layers.values()])
    tensors: dict[str, Tensor] = {}
    for name, part in found.layers.items():
        count = _count(part.mask.numel, sparsity)
        every, differences = padded(part, originals_of(name, part, before), count)
        path = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{path}.{_INDICES}": every.to(torch.int32), f"{path}.{_VALUES}": differences}
    config = {
        "peft_type": "SUPERTUNING",
        "sparsity": sparsity,
        "save_precomputed_indices": True,
    }
    write_sparse(folder, found, tensors, config)


def _count(numel: int, sparsity: float) -> int:
    """How many entries PEFT gives to a layer (``SupertuningLayer._num_trainable``), with its rounding."""
    return int(numel * (1 - sparsity))


def _sparsity(sizes: list[tuple[int, int]]) -> float:
    """The largest sparsity, up to rounding, at which all layers have room for their entries.

    Args:
        sizes: for each layer, how many entries are set, and how many there are.
    """
    sparsity = max(0.0, 1 - max(set_ / numel for set_, numel in sizes))
    while sparsity and any(_count(numel, sparsity) < set_ for set_, numel in sizes):
        sparsity = max(0.0, sparsity - 2**-52)
    return sparsity


def read_supertuning(folder: Path, base: Base) -> dict[str, Part]:
    """See ``Delta.from_supertuning``."""
    config, tensors = read_adapter(folder, "SUPERTUNING", "Super-Tuning")

    def tuned(name: str, path: str, weight: Tensor, values: Tensor) -> Tensor:
        indices = _indices(name, weight, tensors.get(f"{path}.{_INDICES}"), values, config)
        added = weight.reshape(-1).scatter_add(0, indices, values.to(weight.dtype)).view(weight.shape)
        lora = tensors.get(f"{path}.{_DOWN}"), tensors.get(f"{path}.{_UP}")
        return added if lora == (None, None) else added + _lora(name, weight, *lora, config)

    return read_parts(tensors, base, _VALUES, (f".{_INDICES}", f".{_DOWN}", f".{_UP}"), tuned)


def _indices(name: str, weight: Tensor, found: Tensor | None, values: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Flat indices, int64; without any in the file those that PEFT computes: of the largest or smallest entries."""
    if weight.ndim != 2 or values.ndim != 1 or values.numel() > weight.numel():
        raise ValueError(f"{name} is {list(weight.shape)} in the base, and the adapter has {list(values.shape)} values")
    if found is None and config.get("save_precomputed_indices") is False:
        return weight.abs().flatten().topk(values.numel(), largest=bool(config.get("select_top", True))).indices
    if found is None or found.shape != values.shape:
        raise ValueError(f"{name}: the adapter has no indices {list(values.shape)} for its values")
    require_indices(name, found, torch.tensor(weight.numel()), weight.shape)
    return found.long()


def _lora(name: str, weight: Tensor, down: Tensor | None, up: Tensor | None, config: Mapping[str, Any]) -> Tensor:
    """The product of the two matrices of a layer's LoRA, scaled."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    fits = (
        down is not None
        and up is not None
        and isinstance(rank, int)
        and rank > 0
        and isinstance(alpha, (int, float))
        and math.isfinite(alpha)
        and tuple(down.shape) == (rank, weight.shape[1])
        and tuple(up.shape) == (weight.shape[0], rank)
    )
    if not fits:
        raise ValueError(f"{name}: the adapter has no LoRA of rank {rank!r} and scale {alpha!r} for it, as it says")
    return (alpha / rank * (up @ down)).to(weight.dtype)  # type: ignore[operator]
