"""Deltas to and from PEFT's SHiRA adapters, by their files; PEFT need not be installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradsel.delta.making import Base, differing
from gradsel.delta.parts import Part, ascending, read, tensors_of
from gradsel.sealed import replacing

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_shira(parts: Mapping[str, Part], folder: Path, base: Base | None, drop: bool) -> None:
    """See ``Delta.to_shira``."""
    before = {} if base is None else tensors_of(base)
    layers = {name: part for name, part in parts.items() if name.endswith(".weight") and not part.mask.is_whole}
    layers = {name: part for name, part in layers.items() if len(part.mask.shape) == 2}
    saved = _saved_modules(parts, layers)
    lost = [
        name
        for name, part in parts.items()
        if name not in layers and not (name.rpartition(".")[0] in saved and part.mask.is_whole)
    ]
    if lost and not drop:
        raise ValueError(
            f"SHiRA has no place for {len(lost)} parameters, first {lost[0]}: it adapts weights of Linear layers "
            "in part, or saves modules whole; drop=True leaves them out"
        )
    if not layers:
        raise ValueError("the delta sets no weight of two dimensions in part, and SHiRA adapts nothing else")
    r = max(-(-part.mask.nnz // sum(part.mask.shape)) for part in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, part in layers.items():
        indices, differences = _padded(name, part, r, _replaced(name, part, before))
        path = _PREFIX + name.removesuffix(".weight")
        tensors |= {f"{path}.shira_indices": indices, f"{path}.shira_weight": differences}
    for name, part in parts.items():
        if name not in layers and name not in lost:
            tensors[_PREFIX + name] = part.values.clone()
    config = {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",  # any type that PEFT knows; the indices in the file are used
        "target_modules": [name.removesuffix(".weight") for name in layers],
        "modules_to_save": sorted(saved) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _WEIGHTS) as unfinished:
        save_file(tensors, unfinished, {"format": "pt"})
    with replacing(folder / _CONFIG) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2) + "\n")


def _saved_modules(parts: Mapping[str, Part], layers: Mapping[str, Part]) -> set[str]:
    """Modules whose weights the delta sets whole, so that PEFT can save them beside the adapter."""
    wholes = {name for name, part in parts.items() if part.mask.is_whole}
    return {name.removesuffix(".weight") for name in wholes if name.endswith(".weight") and name not in layers}


def _replaced(name: str, part: Part, before: Mapping[str, Tensor]) -> Tensor:
    """The original entries in mask order."""
    if part.originals is not None:
        return part.originals
    if name not in before or tuple(before[name].shape) != part.mask.shape:
        raise ValueError(f"the original entries of {name} are not known, and SHiRA needs them; pass base=")
    entries, digest = read(before[name].detach().cpu(), part)
    if part.digest and digest != part.digest:
        raise ValueError(f"{name} of the base is not what the delta was made on; pass the model as it was before")
    return entries.reshape(part.values.shape)


def _padded(name: str, part: Part, r: int, originals: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [2, n] and float32 [n], with n = r * (in + out) as in PEFT: the entries added to fill up differ by 0."""
    rows, cols = part.mask.shape
    count = r * (rows + cols)
    if count > rows * cols:
        raise ValueError(f"{name} is too small for SHiRA with r = {r}: {count} of its {rows * cols} entries")
    entries, order = ascending(part.mask)
    found = (part.values.double() - originals.double()).reshape(-1)[order]
    unused = torch.ones(rows * cols, dtype=torch.bool).index_fill_(0, entries, False).nonzero().view(-1)
    every, places = torch.cat([entries, unused[: count - entries.numel()]]).sort()
    differences = torch.zeros(count, dtype=torch.float64)
    differences[: found.numel()] = found
    indices = torch.stack([every // cols, every % cols]).to(torch.int32)
    return indices, differences[places].float()


def read_shira(folder: Path, base: Base) -> dict[str, Part]:
    """See ``Delta.from_shira``."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder} is not an adapter of PEFT: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "SHIRA":
        raise ValueError(f"{folder} is not a SHiRA adapter")
    before = tensors_of(base)
    parts = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(".shira_indices"):
            continue
        path, _, last = name.rpartition(".")
        name = f"{path}.weight" if last == "shira_weight" else name
        if name not in before:
            raise ValueError(f"the base has no {name!r}, which the adapter sets")
        tuned = tensor
        if last == "shira_weight":
            tuned = _added(name, before[name], tensors.get(f"{_PREFIX}{path}.shira_indices"), tensor)
        part = differing(name, before[name].detach().cpu(), tuned.to(before[name].dtype))
        if part is not None:
            parts[name] = part
    return parts


def _added(name: str, weight: Tensor, indices: Tensor | None, differences: Tensor) -> Tensor:
    """The weight plus the differences, as PEFT merges them, in the wider of the two dtypes."""
    shape = (2, differences.numel())
    if indices is None or weight.ndim != 2 or tuple(indices.shape) != shape or differences.ndim != 1:
        raise ValueError(f"{name}: the adapter has no indices {list(shape)} for its differences")
    limits = torch.tensor(weight.shape).unsqueeze(1)
    if bool((indices < 0).any()) or bool((indices >= limits).any()):
        raise ValueError(f"{name}: the adapter has indices outside {list(weight.shape)}")
    added = torch.zeros(math.prod(weight.shape), dtype=differences.dtype)
    added.index_add_(0, indices[0].long() * weight.shape[1] + indices[1].long(), differences)
    return weight.detach().cpu() + added.view(weight.shape)
