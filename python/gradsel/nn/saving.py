"""The plain model inside an attached one, as others save and read it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import SUFFIX, differences_in, selected_in
from gradsel.parameters.names import WRAPPERS, unwrapped
from gradsel.quantised import installed
from gradsel.sharding import is_sharded, on_first_rank, whole_of

_NAME = "save_pretrained"
#: The folders from which a Trainer resumes; values must be in them, and it looks nowhere else.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
#: Functions of an attached model and a folder, which write into it what the plain model cannot hold. Rooms above this
#: one add theirs.
BESIDE: list[Callable[[nn.Module, Path], None]] = []


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model without its values and wrappers; tied tensors appear under each of their names.

    Of a sharded model it has DTensors, and all ranks call it.

    Raises:
        ValueError: quantised layers have differences.
    """
    plain = unwrapped(model)
    added = [name for name, module in plain.named_modules() if installed(module) is not None and _adds(module)]
    if added:
        raise ValueError(
            f"{len(added)} quantised layers add differences to their weights, first {added[0]}, and a checkpoint of "
            "the plain model cannot hold them: gradsel.merge(model, dtype) first, or save a delta beside the base"
        )
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        for module in plain.modules():
            for selected in selected_in(module).values():
                if selected.shards is not None:
                    selected.shards.refresh()
                elif (weight := selected.weight()) is not None:
                    selected.refresh(weight)
    hidden = _values_in(plain) | _values_in(plain, differences_in)
    state = plain.state_dict()
    if absent := [key for key, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ValueError(
            f"{len(absent)} tensors are on the meta device, first {_plain(absent[0])}: they are not loaded, or "
            "offloaded by accelerate, whose hooks.remove_hook_from_submodules(model) brings them back"
        )
    # Tied tensors have a key for each name, so that load_state_dict finds all of them.
    return {_plain(key): tensor for key, tensor in state.items() if key not in hidden and isinstance(tensor, Tensor)}


@contextmanager
def whole_state(model: nn.Module) -> Iterator[dict[str, Tensor] | None]:
    """:func:`plain_state`, for the process that writes it.

    Of a sharded model all ranks enter this block. The first one gets the whole tensors, on the CPU, the others None. If
    the block fails there, it fails on all ranks.

    Raises:
        ValueError: see :func:`plain_state`.
        RuntimeError: on other ranks, if the first one fails.
    """
    state = plain_state(model)
    if not any(map(is_sharded, state.values())):
        yield state
        return
    one = {_plain(name): id(p) for name, p in unwrapped(model).named_parameters(remove_duplicate=False)}
    with on_first_rank() as is_first:
        gathered: dict[Any, Tensor] = {}
        for key, tensor in state.items():
            if one.get(key, key) not in gathered:  # tied tensors stay tied
                whole = whole_of(tensor)
                gathered[one.get(key, key)] = whole.cpu() if is_first else whole.new_empty(0)
        yield {key: gathered[one.get(key, key)] for key in state} if is_first else None


def _adds(module: nn.Module) -> bool:
    """Whether a layer with differences, of attach() or of a delta, computes something else than the quantised one."""
    own = [differences.values() for differences in differences_in(module).values()]
    return not own or any(values is None or (not values.is_meta and bool(values.any())) for values in own)


def _values_in(model: nn.Module, held: Callable[[nn.Module], Mapping[str, Any]] = selected_in) -> set[str]:
    """The keys of values, or of differences, in its state_dict."""
    return {
        f"{prefix}.{short}{SUFFIX}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for short in held(module)
    }


def save_plainly(root: nn.Module) -> None:
    """Lets ``save_pretrained`` of a model of transformers that is being attached write the plain model."""
    of_transformers = callable(getattr(type(root), _NAME, None)) and hasattr(root, "config")
    if of_transformers and not hasattr(root, "peft_config"):  # PEFT's writes adapters
        vars(root).setdefault(_NAME, _PlainSaving(root))


def save_as_before(root: nn.Module) -> None:
    """Takes that back, also of a copied model."""
    if isinstance(vars(root).get(_NAME), _PlainSaving):
        del vars(root)[_NAME]


@contextmanager
def answering(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """Lets ``model.state_dict()`` return a state: transformers drops the one it is given if the model is quantised."""
    vars(model)["state_dict"] = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del vars(model)["state_dict"]


class _PlainSaving:
    """``save_pretrained`` of an attached model, as an attribute of it."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        save, folder = getattr(type(self._root), _NAME), Path(save_directory)
        if len(args) > 1 or _CHECKPOINT.fullmatch(folder.name):
            return save(self._root, save_directory, *args, **kwargs)
        given: Mapping[str, Tensor] | None = kwargs.get("state_dict")
        if given is not None:  # gathered by whoever shards the model, on one rank
            hidden = _values_in(self._root)
            kwargs["state_dict"] = {key: tensor for key, tensor in given.items() if key not in hidden}
            return save(self._root, save_directory, *args, **kwargs)
        if sharded := [name for name, parameter in self._root.named_parameters() if is_sharded(parameter)]:
            raise ValueError(
                f"{sharded[0]} is a DTensor, of which this process has a shard: call gradsel.export(model, folder) on "
                "all ranks, or pass the gathered state_dict"
            )
        kwargs["state_dict"] = plain_state(self._root)
        with answering(self._root, kwargs["state_dict"]):
            result = save(self._root, save_directory, *args, **kwargs)
        if (args[0] if args else kwargs.get("is_main_process", True)) and folder.is_dir():
            for write in BESIDE:
                write(self._root, folder)
        return result


def _plain(key: str) -> str:
    """A key without what torch.compile and checkpoint_wrapper add; unlike strip_wrappers, it keeps "module" parts."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
