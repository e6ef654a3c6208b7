"""Adapters of PEFT as files, and what deltas need to become one; PEFT need not be installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsel.delta.making import Base, differing
from gradsel.delta.parts import Part, ascending, read, tensors_of
from gradsel.files import replacing_all
from gradsel.tensor_files import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before the names of the model's tensors.
PREFIX = "base_model.model."
#: Dtypes of values that are added up.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes both files of an adapter, atomically, to a folder that is created."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all([folder / WEIGHTS, folder / CONFIG]) as (weights, settings):
        save_file(dict(tensors), weights, {"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n")


def originals_of(name: str, part: Part, before: Mapping[str, Tensor]) -> Tensor:
    """The entries that a part replaces, in mask order: its own originals, or those of the base.

    Raises:
        ValueError: neither has them, or the base is another.
    """
    if part.originals is not None:
        return part.originals
    if part.differences:
        return torch.zeros_like(part.values)
    if name not in before or tuple(before[name].shape) != part.mask.shape:
        raise ValueError(f"the original entries of {name} are not known, and the adapter needs them; pass base=")
    entries, digest = read(before[name].detach().cpu(), part)
    if part.digest and digest != part.digest:
        raise ValueError(f"{name} of the base is not what the delta was made on; pass the model as it was before")
    return entries.reshape(part.values.shape)


def modules_set_whole(parts: Mapping[str, Part], layers: Mapping[str, Part]) -> set[str]:
    """Modules whose weights the delta sets whole, so that PEFT can save them beside the adapter."""
    wholes = {name for name, part in parts.items() if part.mask.is_whole}
    return {name.removesuffix(".weight") for name in wholes if name.endswith(".weight") and name not in layers}


@dataclass
class SparseParts:
    """The parts of a delta by what an adapter of entries of ``nn.Linear`` can do with them.

    Attributes:
        layers: weights that are set in part, by name.
        modules: modules whose weights are set whole.
        beside: other parts of these modules and their weights, by name.
    """

    layers: dict[str, Part]
    modules: set[str]
    beside: dict[str, Part]


def sparse_parts(parts: Mapping[str, Part], drop: bool, method: str) -> SparseParts:
    """Sorts the parts for an adapter that has entries of weights.

    Args:
        drop: leave out what the adapter cannot hold.
        method: the name of the kind of adapter.

    Raises:
        ValueError: it cannot hold some parts, or there are none that it is for.
    """
    layers = {name: part for name, part in parts.items() if name.endswith(".weight") and not part.mask.is_whole}
    layers = {name: part for name, part in layers.items() if len(part.mask.shape) == 2}
    saved = modules_set_whole(parts, layers)
    rest = {name: part for name, part in parts.items() if name not in layers}
    beside = {name: part for name, part in rest.items() if name.rpartition(".")[0] in saved and part.mask.is_whole}
    lost = [name for name in rest if name not in beside]
    if lost and not drop:
        raise ValueError(
            f"{method} has no place for {len(lost)} parameters, first {lost[0]}: it adapts weights of Linear layers "
            "in part, or saves modules whole; drop=True leaves them out"
        )
    if not layers:
        raise ValueError(f"the delta sets no weight of two dimensions in part, and {method} adapts nothing else")
    return SparseParts(layers, saved, beside)


def padded(part: Part, originals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending row-major indices, int64 [count], and differences, float32 [count], of which those added are 0.

    Args:
        originals: the entries that the part replaces, in mask order.
        count: at least as many as the part sets, at most as many as the tensor has.
    """
    entries, order = ascending(part.mask)
    found = (part.values.double() - originals.double()).reshape(-1)[order]
    first = torch.arange(count)  # as many as are needed in all, so enough of them are free
    unused = first[~torch.isin(first, entries)][: count - entries.numel()]
    every, places = torch.cat([entries, unused]).sort()
    differences = torch.zeros(count, dtype=torch.float64)
    differences[: found.numel()] = found
    return every, differences[places].float()


def read_adapter(folder: Path, kind: str, called: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of an adapter, and its tensors by their names in the model.

    Raises:
        ValueError: the folder has no adapter, or one of another kind.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not an adapter of PEFT: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != kind:
        raise ValueError(f"{folder} is not a {called} adapter")
    return config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def require_floats(name: str, tensor: Tensor, before: Mapping[str, Tensor]) -> None:
    """Checks that an adapter's tensor can be added to the base's, or take its place.

    Raises:
        ValueError: the base has none of that name, or one of them has no numbers that can be added.
    """
    if name not in before:
        raise ValueError(f"the base has no {name!r}, which the adapter sets")
    if tensor.dtype not in FLOATS or before[name].dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype} in the adapter, {before[name].dtype} in the base")


def read_parts(
    tensors: Mapping[str, Tensor],
    base: Base,
    values: str,
    beside: tuple[str, ...],
    tuned: Callable[[str, str, Tensor, Tensor], Tensor],
) -> dict[str, Part]:
    """The parts of a delta with the effect of an adapter of entries.

    Args:
        tensors: of the adapter, by their names in the model. Those that are not a layer's values, and belong to none,
            are modules that it saves whole.
        values: what the name of a layer's values ends in.
        beside: what the names of the tensors end in that belong to these values.
        tuned: makes the weight of a layer with the adapter from its name, the path of the layer, the base's weight and
            the values.

    Raises:
        ValueError: the adapter is for another model, or sets a weight twice.
    """
    before = tensors_of(base)
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    for key, tensor in tensors.items():
        if key.endswith(beside):
            continue
        path, _, last = key.rpartition(".")
        name = f"{path}.weight" if last == values else key
        if name in seen:
            raise ValueError(f"the adapter sets {name} twice")
        seen.add(name)
        require_floats(name, tensor, before)
        weight = before[name].detach().cpu()
        found = tuned(name, path, weight, tensor) if last == values else tensor
        part = differing(name, weight, found.to(weight.dtype))
        if part is not None:
            parts[name] = part
    return parts


def require_indices(name: str, indices: Tensor, limits: Tensor, shape: torch.Size) -> None:
    """Checks indices of entries.

    Args:
        limits: what they have to be below, broadcast to their shape.
        shape: of the weight.

    Raises:
        ValueError: they are not integers, or some are outside.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: the adapter has indices in {indices.dtype}, expected torch.int32 or torch.int64")
    if bool((indices < 0).any()) or bool((indices >= limits).any()):
        raise ValueError(f"{name}: the adapter has indices outside {list(shape)}")


def write_sparse(folder: Path, found: SparseParts, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes an adapter of entries, with the modules that the delta sets whole.

    Args:
        tensors: of the layers.
        config: what only this kind of adapter has.
    """
    beside = {PREFIX + name: part.values.clone() for name, part in found.beside.items()}
    shared = {
        "target_modules": [name.removesuffix(".weight") for name in found.layers],
        "modules_to_save": sorted(found.modules) or None,
        "inference_mode": True,
    }
    write_adapter(folder, {**tensors, **beside}, {**config, **shared})
