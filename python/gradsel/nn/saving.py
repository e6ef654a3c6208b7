"""The plain model inside an attached one, as others save and read it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import SUFFIX, selected_in
from gradsel.parameters.names import WRAPPERS, unwrapped
from gradsel.quantised import installed
from gradsel.sharding import is_sharded

_NAME = "save_pretrained"
#: The folders from which a Trainer resumes; values must be in them, and it looks nowhere else.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
#: Functions of an attached model and a folder, which write into it what the plain model cannot hold. Rooms above this
#: one add theirs.
BESIDE: list[Callable[[nn.Module, Path], None]] = []


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model without its values and wrappers; tied tensors appear under each of their names.

    Raises:
        ValueError: quantised layers have differences, or the model is sharded.
    """
    plain = unwrapped(model)
    added = [name for name, module in plain.named_modules() if installed(module) is not None]
    if added:
        raise ValueError(
            f"{len(added)} quantised layers add differences to their weights, first {added[0]}, and a checkpoint of "
            "the plain model cannot hold them: gradsel.merge(model, dtype) first, or save a delta beside the base"
        )
    hidden: set[str] = set()
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        for prefix, module in plain.named_modules(remove_duplicate=False):
            for short, selected in selected_in(module).items():
                if (weight := selected.weight()) is not None:
                    selected.refresh(weight)
                hidden.add(f"{prefix}.{short}{SUFFIX}".lstrip("."))
    state = plain.state_dict()
    if sharded := [key for key, tensor in state.items() if isinstance(tensor, Tensor) and is_sharded(tensor)]:
        raise ValueError(
            f"{sharded[0]} is a DTensor, of which this process has a shard: apply gradsel.Delta.of(model), which all "
            "ranks call, to the plain model, and export that"
        )
    # Tied tensors have a key for each name, so that load_state_dict finds all of them.
    return {_plain(key): tensor for key, tensor in state.items() if key not in hidden and isinstance(tensor, Tensor)}


def save_plainly(root: nn.Module) -> None:
    """Lets ``save_pretrained`` of a model of transformers that is being attached write the plain model."""
    of_transformers = callable(getattr(type(root), _NAME, None)) and hasattr(root, "config")
    if of_transformers and not hasattr(root, "peft_config"):  # PEFT's writes adapters
        vars(root).setdefault(_NAME, _PlainSaving(root))


def save_as_before(root: nn.Module) -> None:
    """Takes that back, also of a copied model."""
    if isinstance(vars(root).get(_NAME), _PlainSaving):
        del vars(root)[_NAME]


class _PlainSaving:
    """``save_pretrained`` of an attached model, as an attribute of it."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        save, folder = getattr(type(self._root), _NAME), Path(save_directory)
        if len(args) > 1 or kwargs.get("state_dict") is not None or _CHECKPOINT.fullmatch(folder.name):
            return save(self._root, save_directory, *args, **kwargs)
        kwargs["state_dict"] = plain_state(self._root)
        result = save(self._root, save_directory, *args, **kwargs)
        if (args[0] if args else kwargs.get("is_main_process", True)) and folder.is_dir():
            for write in BESIDE:
                write(self._root, folder)
        return result


def _plain(key: str) -> str:
    """A key without what torch.compile and checkpoint_wrapper add; unlike strip_wrappers, it keeps "module" parts."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
