"""The names of a model's parameters, whatever wraps the model, and the modules that use each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradsel.quantised import StandIn, quantised_in

#: Parts that torch.compile and checkpoint_wrapper insert into the names of parameters.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name without the prefixes of DistributedDataParallel, torch.compile and checkpoint_wrapper."""
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}


def shaped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of :func:`named_parameters`, with a stand-in in the shape of the dense weight for each quantised one."""
    quantised = quantised_in(model)
    return {
        name: StandIn(quantised[id(parameter)]) if id(parameter) in quantised else parameter
        for name, parameter in named_parameters(model).items()
    }


Use = tuple[str, nn.Module, str]  # full name, owning module, name in it


def parameter_uses(model: nn.Module) -> dict[str, list[Use]]:
    """Every parameter by its first name, with all its uses.

    Raises:
        ValueError: two parameters have the same name once the parts that wrappers insert are removed.
    """
    by_id: dict[int, tuple[str, list[Use]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for short, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = strip_wrappers(f"{prefix}.{short}" if prefix else short)
            by_id.setdefault(id(parameter), (name, []))[1].append((name, module, short))
    order: dict[str, int] = {}
    for full, parameter in model.named_parameters():
        if order.setdefault(strip_wrappers(full), id(parameter)) != id(parameter):
            raise ValueError(
                f"{full} and another parameter of {type(model).__name__} are both {strip_wrappers(full)} without the "
                "prefixes of wrappers; rename one of their modules"
            )
    return {name: by_id[key][1] for name, key in order.items()}


def strings(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; a string is one name."""
    return (names,) if isinstance(names, str) else tuple(names)


def has_part(name: str, heads: tuple[str, ...]) -> bool:
    """Whether one of ``heads`` is among the dotted parts of ``name``."""
    return any(f".{head}." in f".{name}." for head in heads)


def strip_wrappers(name: str) -> str:
    """A parameter's name without what DistributedDataParallel, torch.compile and checkpoint_wrapper add."""
    return ".".join(_unwrapped(name.split(".")))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _unwrapped(parts: list[str]) -> Iterator[str]:
    leading = True
    for part in parts:
        if part in WRAPPERS or (leading and part == "module"):
            continue
        leading = False
        yield part
