"""Adapters of PEFT as files, and what deltas need to become one; PEFT need not be installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradsel.delta.parts import Part, read
from gradsel.files import replacing_all
from gradsel.tensor_files import save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before the names of the model's tensors.
PREFIX = "base_model.model."


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
