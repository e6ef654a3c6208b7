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
    require_floats,
    sparse_parts,
    write_adapter,
)
from gradsel.delta.making import Base, differing
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
    tensors |= {PREFIX + name: part.values.clone() for name, part in found.beside.items()}
    config = {
        "peft_type": "SUPERTUNING",
        "sparsity": sparsity,
        "target_modules": [name.removesuffix(".weight") for name in found.layers],
        "modules_to_save": sorted(found.modules) or None,
        "save_precomputed_indices": True,
        "inference_mode": True,
    }
    write_adapter(folder, tensors, config)


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
    before = tensors_of(base)
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    own = (f".{_INDICES}", f".{_DOWN}", f".{_UP}")
    for key, tensor in tensors.items():
        if key.endswith(own):
            continue
        path, _, last = key.rpartition(".")
        name = f"{path}.weight" if last == _VALUES else key
        if name in seen:
            raise ValueError(f"the adapter sets {name} twice")
        seen.add(name)
        require_floats(name, tensor, before)
        weight, tuned = before[name].detach().cpu(), tensor
        if last == _VALUES:
            indices = _indices(name, weight, tensors.get(f"{path}.{_INDICES}"), tensor, config)
            tuned = weight.reshape(-1).scatter_add(0, indices, tensor.to(weight.dtype)).view(weight.shape)
            lora = tensors.get(f"{path}.{_DOWN}"), tensors.get(f"{path}.{_UP}")
            if lora != (None, None):
                tuned = tuned + _lora(name, weight, *lora, config)
        part = differing(name, weight, tuned.to(weight.dtype))
        if part is not None:
            parts[name] = part
    return parts


def _indices(name: str, weight: Tensor, found: Tensor | None, values: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Flat indices, int64; without any in the file those that PEFT computes: of the largest or smallest entries."""
    if weight.ndim != 2 or values.ndim != 1 or values.numel() > weight.numel():
        raise ValueError(f"{name} is {list(weight.shape)} in the base, and the adapter has {list(values.shape)} values")
    if found is None and config.get("save_precomputed_indices") is False:
        return weight.abs().flatten().topk(values.numel(), largest=bool(config.get("select_top", True))).indices
    if found is None or found.shape != values.shape:
        raise ValueError(f"{name}: the adapter has no indices {list(values.shape)} for its values")
    if found.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: the adapter has indices in {found.dtype}, expected torch.int32 or torch.int64")
    found = found.long()
    if bool((found < 0).any()) or bool((found >= weight.numel()).any()):
        raise ValueError(f"{name}: the adapter has indices outside {list(weight.shape)}")
    return found


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
