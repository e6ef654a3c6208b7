"""A full checkpoint of a trained model, for those who do not have this library."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsel.attached import SUFFIX, selected_in
from gradsel.parameters.names import WRAPPERS, unwrapped
from gradsel.sealed import replacing


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a full checkpoint, safetensors, with the keys of the plain model: nothing in it is of this library.

    Args:
        model: attached or not, wrapped or not. Its weights are written, not the float32 values that it is trained by.
        path: the file, written atomically.
    """
    plain = unwrapped(model)
    hidden = {
        f"{prefix}.{short}{SUFFIX}".lstrip(".")
        for prefix, module in plain.named_modules(remove_duplicate=False)
        for short in selected_in(module)
    }
    # Clones: tied tensors are written once for each name, so that load_state_dict finds all of them.
    copies = {
        ".".join(part for part in key.split(".") if part not in WRAPPERS): tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for key, tensor in plain.state_dict().items()
        if key not in hidden and isinstance(tensor, Tensor)
    }
    with replacing(path) as unfinished:
        save_file(copies, unfinished, {"format": "pt"})


def _plain(key: str) -> str:
    """Without what torch.compile and checkpoint_wrapper put into it; a module called "module" is the model's own."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
