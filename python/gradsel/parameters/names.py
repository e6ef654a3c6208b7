"""The names of a model's parameters, whatever wraps the model, and the modules that use each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradsel.quantised import Quantised, StandIn, keeps_elsewhere, quantised_weight, weight_parameter

#: Parts that torch.compile and checkpoint_wrapper insert into the names of parameters.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name without the prefixes of DistributedDataParallel, torch.compile and checkpoint_wrapper."""
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}


def shaped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of :func:`named_parameters`, with a stand-in in the shape of the dense weight for each quantised one."""
    uses = parameter_uses(model)
    quantised = quantised_in(uses)
    return {
        name: StandIn(quantised[name]) if name in quantised else weight_parameter(module, short)
        for name, ((_, module, short), *_) in uses.items()
    }


Use = tuple[str, nn.Module, str]  # full name, owning module, name in it


def parameter_uses(model: nn.Module) -> dict[str, list[Use]]:
    """Every parameter by its first name, with all its uses.

    A quantised weight is one parameter called ``weight``, in whichever tensors its layer keeps it.

    Raises:
        ValueError: two parameters have the same name once the parts that wrappers insert are removed.
    """
    by_id: dict[int, tuple[str, list[Use]]] = {}
    order: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for short, key in _own(module):
            full = f"{prefix}.{short}" if prefix else short
            name = strip_wrappers(full)
            by_id.setdefault(key, (name, []))[1].append((name, module, short))
            if order.setdefault(name, key) != key:
                raise ValueError(
                    f"{full} and another parameter of {type(model).__name__} are both {name} without the prefixes of "
                    "wrappers; rename one of their modules"
                )
    return dict(by_id.values())


def _own(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The names of a module's own parameters, and what tells whether they are the same as those of another."""
    elsewhere = keeps_elsewhere(module)
    if elsewhere:
        yield "weight", id(module)
    for short, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if not elsewhere or short == "bias":
            yield short, id(parameter)


def quantised_in(uses: Mapping[str, list[Use]]) -> dict[str, Quantised]:
    """The quantised weights among the parameters that :func:`parameter_uses` has found."""
    found = {name: quantised_weight(module, short) for name, ((_, module, short), *_) in uses.items()}
    return {name: quantised for name, quantised in found.items() if quantised is not None}


def strings(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; a string is one name."""
    return (names,) if isinstance(names, str) else tuple(names)


def has_part(name: str, heads: tuple[str, ...]) -> bool:
    """Whether one of ``heads`` is among the dotted parts of ``name``."""
    return any(f".{head}." in f".{name}." for head in heads)


def strip_wrappers(name: str) -> str:
    """A parameter's name without what DistributedDataParallel, torch.compile and checkpoint_wrapper add."""
    return ".".join(_unwrapped(name.split(".")))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that ``torch.compile(model)`` returns."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while isinstance(model := uncompiled(model), (nn.DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def _unwrapped(parts: list[str]) -> Iterator[str]:
    leading = True
    for part in parts:
        if part in WRAPPERS or (leading and part == "module"):
            continue
        leading = False
        yield part
