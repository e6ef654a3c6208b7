"""Full checkpoints of a trained model, for use without this library."""

from __future__ import annotations

import os

from torch import Tensor, nn

from gradsel.attached import SUFFIX, selected_in
from gradsel.files import replacing
from gradsel.parameters.names import WRAPPERS, unwrapped
from gradsel.tensor_files import save_file


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a full safetensors checkpoint with the keys of the plain model, which loads without this library.

    Args:
        model: attached or not, wrapped or not. Its weights are written, not their float32 values in training.
        path: the file, written atomically.

    Raises:
        OSError: the file cannot be written.
    """
    plain = unwrapped(model)
    hidden = {
        f"{prefix}.{short}{SUFFIX}".lstrip(".")
        for prefix, module in plain.named_modules(remove_duplicate=False)
        for short in selected_in(module)
    }
    # Tied tensors are written once per name, so that load_state_dict finds all of them.
    tensors = {
        _plain(key): tensor
        for key, tensor in plain.state_dict().items()
        if key not in hidden and isinstance(tensor, Tensor)
    }
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, {"format": "pt"})


def _plain(key: str) -> str:
    """A key without what torch.compile and checkpoint_wrapper add; unlike strip_wrappers, it keeps "module" parts."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
