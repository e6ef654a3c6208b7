"""Full checkpoints of a trained model, for use without this library."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsel.attached import SUFFIX, selected_in
from gradsel.parameters.names import WRAPPERS, unwrapped
from gradsel.sealed import replacing


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a full safetensors checkpoint with the keys of the plain model, which loads without this library.

    Args:
        model: attached or not, wrapped or not. Its weights are written, not their float32 values in training.
        path: the file, written atomically.
    """
    plain = unwrapped(model)
    hidden = {
        f"{prefix}.{short}{SUFFIX}".lstrip(".")
        for prefix, module in plain.named_modules(remove_duplicate=False)
        for short in selected_in(module)
    }
    # Clones: tied tensors are written once per name, so that load_state_dict finds all of them.
    copies = {
        _plain(key): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in plain.state_dict().items()
        if key not in hidden and isinstance(tensor, Tensor)
    }
    with replacing(path) as unfinished:
        save_file(copies, unfinished, {"format": "pt"})


def _plain(key: str) -> str:
    """A key without what torch.compile and checkpoint_wrapper add; unlike strip_wrappers, it keeps "module" parts."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
