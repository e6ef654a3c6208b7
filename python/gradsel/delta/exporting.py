"""Full checkpoints of a trained model, for use without this library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradsel.attached import differences_in, is_values
from gradsel.files import filling, replacing
from gradsel.nn.saving import answering, whole_state
from gradsel.parameters.names import unwrapped
from gradsel.tensor_files import save_file

#: By these, readers of a folder find its weights.
_INDEX = ("model.safetensors", "model.safetensors.index.json")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
#: Suffixes by which others know files of torch.save().
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def export(model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
    """Writes a full safetensors checkpoint with the keys of the plain model, which loads without this library.

    Of a sharded model (FSDP2, tensor parallelism), all ranks call it. It is gathered tensor by tensor into the memory
    of the first rank's CPU, which writes.

    Args:
        model: attached or not, wrapped or not. Its weights are written, not their float32 values in training.
        path: the file, ``*.safetensors``; or a folder, if there is one or ``max_shard_size`` is given. A folder gets
            ``model.safetensors``, or shards with their index ``model.safetensors.index.json``; a model of transformers
            is written as by ``save_pretrained``, with its ``config.json`` and the names that its checkpoints have.
            Everything is written atomically: a crash leaves the old files, or at worst no index.
        max_shard_size: in a folder, the largest size of a file in bytes, or as in ``"5GB"``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the file has a suffix of ``torch.save``; ``max_shard_size`` is not a size; adapters of PEFT are in a
            model of transformers; quantised layers have differences, or are of torchao.
        RuntimeError: the model is sharded, and the first rank could not write; its own error says why.
    """
    if max_shard_size is None and not os.path.isdir(path):
        if (suffix := Path(path).suffix.lower()) in _PICKLES:
            raise ValueError(
                f"path is {os.fspath(path)}, and {suffix} stands for files of torch.save(), but a safetensors file is "
                "written: name it *.safetensors, or pass a folder. For a file of torch.save(), call "
                "gradsel.detach(model) and torch.save(model.state_dict(), path)"
            )
        with whole_state(model) as state:
            if state is not None:
                with replacing(path) as unfinished:
                    save_file(state, unfinished, {"format": "pt"})
        return
    with whole_model(model, path, max_shard_size or "5GB"):
        pass


@contextmanager
def whole_model(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str, **kwargs: Any
) -> Iterator[Path | None]:
    """Writes a model to a folder, together with what the block writes to the folder that it is given.

    Ranks of a sharded model that do not write are given None.

    Args:
        kwargs: for ``save_pretrained`` of a model of transformers.

    Raises:
        OSError, ValueError: see :func:`export`; ``folder`` is as it was.
    """
    plain = unwrapped(model)
    write = _transformers_writer(plain, kwargs)
    _require_size(max_shard_size)
    with whole_state(plain) as state:
        if state is None:
            yield None
            return
        with filling(folder, index=_INDEX) as new:
            if write is None:
                _write_shards(state, new, max_shard_size)
            else:
                write(new, state, max_shard_size)
            yield new
            written = {file.name for file in new.iterdir()}
        for file in Path(folder).iterdir():  # of an older set with another number of shards
            if _SHARD.fullmatch(file.name) and file.name not in written:
                file.unlink()


def _require_size(size: int | str) -> None:
    digits = re.fullmatch(r"(\d+)([KMGT]B)?", str(size), re.IGNORECASE)
    if digits is None or not int(digits[1]) or isinstance(size, bool) or (isinstance(size, str) and not digits[2]):
        raise ValueError(f'max_shard_size is {size!r}, expected bytes, or text such as "5GB"')


def is_of_transformers(model: nn.Module) -> bool:
    """Whether transformers knows how to save the model."""
    plain = unwrapped(model)
    return callable(getattr(plain, "save_pretrained", None)) and hasattr(plain, "config")


def _transformers_writer(
    plain: nn.Module, kwargs: dict[str, Any]
) -> Callable[[Path, dict[str, Tensor], int | str], None] | None:
    if not is_of_transformers(plain):
        return None
    if hasattr(plain, "peft_config") or getattr(plain, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has adapters of PEFT, which are not part of a plain model: merge them first, "
            "gradsel.detach(model).merge_and_unload(), or save them alone by model.save_pretrained()"
        )

    def write(folder: Path, state: dict[str, Tensor], max_shard_size: int | str) -> None:
        with answering(plain, state):
            plain.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size, **kwargs)  # type: ignore[operator]
        if (index := folder / _INDEX[1]).exists():  # it counts all parameters, values too
            found = json.loads(index.read_text(encoding="utf-8"))
            added = [p.numel() for p in plain.parameters() if is_values(p)]
            added += [d.mask.nnz for module in plain.modules() for d in differences_in(module).values()]
            found["metadata"]["total_parameters"] -= sum(added)
            _write_index(found, folder)

    return write


def _write_shards(state: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ImportError as error:
        raise ImportError(
            "writing a folder needs huggingface_hub: pip install huggingface_hub, or name a file instead"
        ) from error
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, folder / name, {"format": "pt"})
    if split.is_sharded:
        _write_index({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, folder)


def _write_index(index: dict[str, Any], folder: Path) -> None:
    (folder / _INDEX[1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
