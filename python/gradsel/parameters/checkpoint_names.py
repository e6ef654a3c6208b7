"""The names that a transformers model's tensors have in its checkpoints, and the layout that they have there.

``save_pretrained`` writes a model's tensors under other names than the model has for them: the
``vit.layers.0.attention.q_proj.weight`` of a ViT is ``vit.encoder.layer.0.attention.attention.query.weight`` in its
checkpoints. Some models also merge, split or permute tensors: the experts of a Mixtral are single tensors in its
checkpoints, and stacked in the model. transformers publishes these conversions (``transformers.conversion_mapping``);
here they are run on names, and on tensors of indices that tell where each entry goes.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import is_values
from gradsel.parameters.names import strip_wrappers, unwrapped

Shape = tuple[int, ...]


class Group:
    """Tensors of a checkpoint, and the tensors of the model that they become.

    Attributes:
        checkpoint: shapes of the checkpoint's tensors by name, in the order of their conversion.
        model: shapes of the model's tensors by name.
        is_renaming: whether it is one tensor, which only has two names.
    """

    def __init__(self, key: str, sources: Mapping[str, Shape], converter: Any = None, model: Any = None) -> None:
        """
        Args:
            key: the first of the model's tensors.
            sources: shapes of the checkpoint's tensors.
            converter: for all that is not a mere renaming, the ``WeightConverter`` that has collected these names.
            model: the model, which a converter asks for its configuration and shapes.
        """
        self.checkpoint = dict(sources)
        self.is_renaming = converter is None
        self._key, self._converter, self._model = key, converter, model
        if self.is_renaming:
            self.model = dict.fromkeys((key,), *sources.values())
        else:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in sources.items()}
            self.model = {name: tuple(tensor.shape) for name, tensor in self._converted(tensors).items()}

    def origins(self) -> Tensor:
        """Where each entry of the model's tensors comes from.

        Returns:
            int32 or int64 [n], for the entries of ``model`` in order, row-major: their numbers in ``checkpoint``.

        Raises:
            ValueError: the conversion does more than move entries.
        """
        sizes = [math.prod(shape) for shape in self.checkpoint.values()]
        numbers = torch.arange(sum(sizes), dtype=torch.int32 if sum(sizes) < 2**31 else torch.int64)
        if self.is_renaming:
            return numbers
        pieces = zip(self.checkpoint.items(), numbers.split(sizes), strict=True)
        made = self._converted({name: piece.view(shape) for (name, shape), piece in pieces})
        found = torch.cat([tensor.reshape(-1) for tensor in made.values()])
        if found.dtype is not numbers.dtype or found.numel() != numbers.numel() or not _is_permutation(found):
            raise ValueError(f"{self}, and more than that: not every entry stays what it is, so none is translated")
        return found

    def leaves(self, name: str) -> bool:
        """Whether it is one tensor, which has this name and the same entries on both sides."""
        if tuple(self.model) != (name,) or tuple(self.checkpoint) != (name,):
            return False
        return self.is_renaming or bool((self.origins().diff() == 1).all())

    def _converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self._converter)
        for pattern, names in converter.collected_tensors.items():
            converter.collected_tensors[pattern] = [tensors[name] for name in names]
        try:
            made = converter.convert(self._key, model=self._model, config=self._model.config)
        except Exception as error:  # any, from the operations of any model
            raise ValueError(f"transformers cannot convert {_some(tensors)} to {self._key}: {error}") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def __str__(self) -> str:
        return f"{_some(self.checkpoint)} of the checkpoint become {_some(self.model)} of the model"


class CheckpointNames:
    """Which names of a model's tensors stand for which names in a checkpoint.

    Attributes:
        checkpoint: shapes of the checkpoint's tensors, by name.
        model: shapes of the model's tensors that checkpoints contain, by name.
    """

    def __init__(self, model: Any, checkpoint: Mapping[str, Shape], conversions: Sequence[Any] | None = None) -> None:
        """
        Args:
            model: a transformers model; only its structure matters.
            checkpoint: shapes of the tensors of a checkpoint that can be loaded into the model.
            conversions: those that loading it applies; default: all that transformers has for this model.
        """
        self.checkpoint = dict(checkpoint)
        self.model = _shapes(model)
        self._prefix: str = model.base_model_prefix
        self._aliases = _aliases(model)
        self._by_model: dict[str, Group] = {}
        self._by_checkpoint: dict[str, Group] = {}
        #: Why some tensors have no group, by the side that they would be translated into and their name.
        self._refused: dict[tuple[str, str], str] = {}
        try:
            self._group(model, conversions)
        except Exception as error:  # any, from the conversions of any model
            raise ValueError(f"transformers cannot convert the names of {type(model).__name__}: {error}") from error

    def to_checkpoint(self, name: str) -> tuple[str, ...]:
        """The names in the checkpoint of a tensor of the model; several if it is split, none if it is not known."""
        group = self.group(name, "checkpoint")
        return () if group is None else tuple(group.checkpoint)

    def to_model(self, name: str) -> tuple[str, ...]:
        """The names in the model of a tensor of the checkpoint; several if it is split, none if it is not known."""
        group = self.group(name, "model")
        return () if group is None else tuple(group.model)

    def group(self, name: str, into: str) -> Group | None:
        """The group of a tensor that is to be translated ``into`` names of the "checkpoint" or the "model".

        Raises:
            ValueError: transformers cannot convert it.
        """
        if (into, name) in self._refused:
            raise ValueError(self._refused[into, name])
        if into == "model":
            return self._by_checkpoint.get(name)
        known = self._in_model(name)
        return None if known is None else self._by_model[known]

    def _in_model(self, name: str) -> str | None:
        """The first of a tensor's names that has a group: its own, that with or without the prefix, or a tied one."""
        prefix = f"{self._prefix}."
        for known in (name, prefix + name, name.removeprefix(prefix)):
            for alias in (known, *self._aliases.get(known, ())):
                if alias in self._by_model:
                    return alias
        return None

    def own_name(self, name: str, into: str) -> str:
        """The name by which the group of a tensor knows it; another than ``name`` for a tied tensor, for example."""
        return name if into == "model" else self._in_model(name) or name

    def lacking(self, given: Mapping[str, Shape]) -> str:
        """Why a checkpoint with further tensors is not one of the whole model; "" if it is.

        Args:
            given: shapes of the further tensors, by their names in the model.

        Raises:
            ValueError: transformers cannot convert some.
        """
        for name, shape in given.items():
            if self.model.get(name) != shape:
                found = list(self.model[name]) if name in self.model else "none"
                return f"the delta has {name} {list(shape)}, the model {found}"
        for name, shape in self.model.items():
            group = None if name in given else self.group(name, "checkpoint")
            if name not in given and (group is None or group.model[self.own_name(name, "checkpoint")] != shape):
                return f"the model has {name} {list(shape)}, which is neither in the delta nor in the checkpoint"
        return ""

    def _group(self, model: Any, conversions: Sequence[Any] | None) -> None:
        """Does to names what ``convert_and_load_state_dict_in_model`` does to tensors."""
        loading = _module("core_model_loading")
        if conversions is None:
            conversions = _module("conversion_mapping").get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, loading.WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, loading.WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        collected: dict[str, tuple[Any, list[str]]] = {}
        for name in sorted(self.checkpoint, key=loading.dot_natural_key):
            renamed, pattern = loading.rename_source_key(name, renamings, converters, self._prefix, self.model)
            if renamed not in self.model and name in self.model:
                renamed, pattern = loading.rename_source_key(name, [], [], self._prefix, self.model)
            if renamed not in self.model:
                continue
            converter = None if pattern is None else copy.deepcopy(by_pattern[pattern])
            converter, names = collected.setdefault(renamed, (converter, []))
            if converter is not None and pattern is not None:
                converter.collected_tensors[pattern].append(name)
            elif names:
                continue  # of two names for one tensor, transformers takes the first
            names.append(name)
        for renamed, (converter, names) in collected.items():
            try:
                group = Group(renamed, {name: self.checkpoint[name] for name in names}, converter, model)
            except ValueError as error:
                refused = [("checkpoint", renamed), *(("model", name) for name in names)]
                self._refused |= dict.fromkeys(refused, str(error))
                continue
            self._by_model |= dict.fromkeys(group.model, group)
            self._by_checkpoint |= dict.fromkeys(group.checkpoint, group)


def of_model(model: nn.Module, wanted: Mapping[str, Shape]) -> CheckpointNames | None:
    """The names in checkpoints of a model, attached or not.

    Args:
        wanted: shapes of tensors by their names in some checkpoint of the model. There are several possibilities: as
            the model would be saved now, or as one that was not loaded from other names would be, or with such names.

    Returns:
        The first possibility that has all of these names, otherwise the last. None if it is no transformers model.
    """
    model = unwrapped(model)
    if not _is_pretrained(model):
        return None
    names = None
    used = getattr(model, "_weight_conversions", None)
    for own in [*([] if used is None else [used]), None]:
        stand_in = copy.copy(model)
        stand_in.__dict__["_weight_conversions"] = own
        try:
            saved = _saved(stand_in)
        except Exception:  # from the operations of any model; the names that are wanted may need none of them
            continue
        names = CheckpointNames(model, saved, None if own is None else [_fresh(each) for each in own])
        if all(name in names._by_checkpoint for name in wanted):
            return names
    return CheckpointNames(model, wanted)


def of_folder(folder: Path, checkpoint: Mapping[str, Shape]) -> CheckpointNames | None:
    """The names in a folder that ``save_pretrained`` wrote.

    Args:
        checkpoint: shapes of the tensors of the checkpoint in this folder.

    Returns:
        None if the folder does not say of which model it is, see :func:`model_of`.

    Raises:
        ValueError: transformers is not installed, or cannot build the model.
    """
    model = model_of(folder)
    return None if model is None else CheckpointNames(model, checkpoint)


def model_of(folder: Path) -> nn.Module | None:
    """The model that the ``config.json`` in a folder describes, on the meta device; no code in the folder is executed.

    Returns:
        None if there is no such file, or it names no model of transformers.

    Raises:
        ValueError: transformers is not installed, or cannot build the model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        architecture = config["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    try:
        transformers = importlib.import_module("transformers")
        _module("conversion_mapping")
    except ImportError as error:
        raise ValueError(
            f"{folder / 'config.json'} names {architecture}, whose tensors may have other names in its checkpoints; "
            f"translating them needs transformers 5 ({error})"
        ) from None
    found = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    kind: Any = found
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # any, from a model's code
        raise ValueError(f"transformers cannot build the {architecture} of {folder}: {error}") from error
    return model


def _is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers, of a version that converts checkpoints."""
    transformers = sys.modules.get("transformers")  # if the model is one, it has been imported
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    try:
        return bool(_module("conversion_mapping"))
    except ImportError:
        return False


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.{name}")


def _shapes(model: nn.Module) -> dict[str, Shape]:
    """The shapes of the model's tensors that checkpoints contain, without what attach() adds."""
    return {
        strip_wrappers(name): tuple(tensor.shape)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not is_values(tensor)
    }


def _aliases(model: Any) -> dict[str, list[str]]:
    """The other names of tied tensors, by each of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(strip_wrappers(name))
    found = {name: [each for each in own if each != name] for own in names.values() for name in own if len(own) > 1}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        found.setdefault(name, []).append(source)
        found.setdefault(source, []).append(name)
    return found


def _saved(model: Any) -> dict[str, Shape]:
    """The shapes of the tensors that ``save_pretrained`` would write, by name."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in _shapes(model).items()}
    saved = _module("core_model_loading").revert_weight_conversion(model, tensors)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _is_permutation(numbers: Tensor) -> bool:
    if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= numbers.numel()):
        return False
    seen = torch.zeros(numbers.numel(), dtype=torch.bool)
    seen[numbers] = True
    return bool(seen.all())


def _fresh(conversion: Any) -> Any:
    """A conversion that has not seen any names yet."""
    made = copy.deepcopy(conversion)
    if hasattr(made, "_active"):
        made._active = None
    return made


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
