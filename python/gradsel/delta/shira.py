"""Deltas to and from PEFT's SHiRA adapters, by their files; PEFT need not be installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradsel.delta.adapter_files import CONFIG, PREFIX, WEIGHTS, modules_set_whole, originals_of, write_adapter
from gradsel.delta.making import Base, differing
from gradsel.delta.parts import Part, ascending, tensors_of
from gradsel.tensor_files import load_file

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_shira(parts: Mapping[str, Part], folder: Path, base: Base | None, drop: bool) -> None:
    """See ``Delta.to_shira``."""
    before = {} if base is None else tensors_of(base)
    layers = {name: part for name, part in parts.items() if name.endswith(".weight") and not part.mask.is_whole}
    layers = {name: part for name, part in layers.items() if len(part.mask.shape) == 2}
    saved = modules_set_whole(parts, layers)
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
        indices, differences = _padded(name, part, r, originals_of(name, part, before))
        path = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{path}.shira_indices": indices, f"{path}.shira_weight": differences}
    for name, part in parts.items():
        if name not in layers and name not in lost:
            tensors[PREFIX + name] = part.values.clone()
    config = {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",  # any type that PEFT knows; the indices in the file are used
        "target_modules": [name.removesuffix(".weight") for name in layers],
        "modules_to_save": sorted(saved) or None,
        "inference_mode": True,
    }
    write_adapter(folder, tensors, config)


def _padded(name: str, part: Part, r: int, originals: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [2, n] and float32 [n], with n = r * (in + out) as in PEFT: the entries added to fill up differ by 0."""
    rows, cols = part.mask.shape
    count = r * (rows + cols)
    if count > rows * cols:
        raise ValueError(f"{name} is too small for SHiRA with r = {r}: {count} of its {rows * cols} entries")
    entries, order = ascending(part.mask)
    found = (part.values.double() - originals.double()).reshape(-1)[order]
    first = torch.arange(count)  # as many as are needed in all, so enough of them are free
    unused = first[~torch.isin(first, entries)][: count - entries.numel()]
    every, places = torch.cat([entries, unused]).sort()
    differences = torch.zeros(count, dtype=torch.float64)
    differences[: found.numel()] = found
    indices = torch.stack([every // cols, every % cols]).to(torch.int32)
    return indices, differences[places].float()


def read_shira(folder: Path, base: Base) -> dict[str, Part]:
    """See ``Delta.from_shira``."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not an adapter of PEFT: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "SHIRA":
        raise ValueError(f"{folder} is not a SHiRA adapter")
    before = tensors_of(base)
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".shira_indices"):
            continue
        path, _, last = name.rpartition(".")
        name = f"{path}.weight" if last == "shira_weight" else name
        if name in seen:
            raise ValueError(f"the adapter sets {name} twice")
        seen.add(name)
        if name not in before:
            raise ValueError(f"the base has no {name!r}, which the adapter sets")
        if tensor.dtype not in _FLOATS or before[name].dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype} in the adapter, {before[name].dtype} in the base")
        tuned = tensor
        if last == "shira_weight":
            tuned = _added(name, before[name], tensors.get(f"{PREFIX}{path}.shira_indices"), tensor)
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
