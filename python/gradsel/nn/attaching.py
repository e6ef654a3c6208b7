"""attach() and detach(): a model that trains what a selection says, and forms no other gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradsel.attached import RECORD, STATE, SUFFIX, Record, link
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask
from gradsel.nn.modules import Attached, attached_class, detach_module, direct_forward, selected_of, sync_module
from gradsel.parameters.names import Use, parameter_uses, strip_wrappers
from gradsel.selection.selection import Selection, lookup
from gradsel.tables import grouped, shape_text, table


@dataclass
class Route:
    """How one parameter is trained.

    Attributes:
        route: "direct", "harvest", "whole" or "frozen".
        why: in a few words.
        trained: number of trained entries.
    """

    route: str
    why: str
    shape: tuple[int, ...]
    trained: int


class AttachReport(Mapping[str, Route]):
    """What :func:`attach` did with every parameter; printable."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = dict(routes)

    def __getitem__(self, name: str) -> Route:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def __str__(self) -> str:
        rows = grouped((name, (r.shape, r.route, r.why, r.trained)) for name, r in self.items())
        cells = [
            (name, shape_text(shape), route, why, f"{trained * count:,}" if trained else "-")
            for name, (shape, route, why, trained), count in rows
        ]
        direct, harvest = (sum(r.route == route for r in self.values()) for route in ("direct", "harvest"))
        lines = table(("parameter", "shape", "route", "why", "trained"), cells)
        lines.append(f"{sum(r.trained for r in self.values()):,} entries trained; {direct} parameters by the direct "
                     f"route, {harvest} by the harvest of a dense gradient")  # fmt: skip
        return "\n".join(lines)


def attach(model: nn.Module, selection: Selection) -> AttachReport:
    """Makes a model train what a selection says, without dense gradients. In place.

    Partly selected weights get a parameter of their selected entries, ``<name>_values``, in float32 (float64 for
    float64), and are frozen; parameters selected whole are trained as they are; all others are frozen. Give
    ``trainable_parameters(model)`` to an optimizer, to :class:`~gradsel.optim.MaskedAdam` best of all. Attach before
    wrapping the model in DistributedDataParallel or torch.compile.

    Args:
        model: any module. Its parameters stay the same objects, and its state_dict keeps its keys.
        selection: from :func:`gradsel.select` on this model.

    Returns:
        Which parameter is trained by which route.

    Raises:
        KeyError, ValueError: the selection is for another model, or the model is attached already; nothing has changed.
    """
    if any(isinstance(module, Attached) or RECORD in vars(module) for module in model.modules()):
        raise ValueError("the model is attached already; call gradsel.detach(model) first")
    uses = parameter_uses(model)
    masks = {name: lookup(selection, name) for name in uses}
    parameters = _parameters_of(uses)
    _check(masks, parameters, uses, selection)

    routes: dict[str, Route] = {}
    values: dict[str, nn.Parameter] = {}
    partial: dict[nn.Module, dict[str, str]] = {}  # of each module: the parameter's name in it, and its full name
    for name, mask in masks.items():
        if mask.is_whole or not mask.nnz:
            routes[name] = Route("whole" if mask.nnz else "frozen", mask.label, mask.shape, mask.nnz)
            continue
        entries = mask.gather(parameters[name].detach()).to(trained_dtype(parameters[name]))
        values[name] = nn.Parameter(entries)
        for _, module, short in uses[name]:
            partial.setdefault(module, {})[short] = name
    states = {
        module: {short: selected_of(module, name, masks[name], parameters[name], short) for short, name in own.items()}
        for module, own in partial.items()
    }
    record = Record(
        {name: parameter.requires_grad for name, parameter in parameters.items()},
        {name: parameters[name].detach().clone() for name, mask in masks.items() if mask.is_whole and mask.nnz},
    )

    classes: dict[nn.Module, Any] = {}
    for module, selected in states.items():
        forward = direct_forward(module) if any(state.how is not None for state in selected.values()) else None
        base: Any = type(module)
        classes[module] = attached_class(base, forward, tuple(sorted(selected)))

    # Nothing has changed so far; from here on nothing fails.
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in record.wholes)
        if name not in record.wholes:
            parameter.grad = None
    for module, selected in states.items():
        for short, state in selected.items():
            module.register_parameter(short + SUFFIX, values[state.name])
            route = "direct" if state.how is not None else "harvest"
            if state.name not in routes or route == "harvest":
                routes[state.name] = Route(route, type(module).__name__, state.mask.shape, state.mask.nnz)
        setattr(module, STATE, selected)
        module.__class__ = classes[module]
        link(module)
    setattr(model, RECORD, record)
    return AttachReport({name: routes[name] for name in masks})


def _parameters_of(uses: Mapping[str, list[Use]]) -> dict[str, nn.Parameter]:
    """The parameters themselves, also where an attached module's attribute is an alias."""
    return {name: cast(nn.Parameter, module._parameters[short]) for name, ((_, module, short), *_) in uses.items()}


def _check(
    masks: Mapping[str, Mask], parameters: Mapping[str, Tensor], uses: Mapping[str, list[Use]], selection: Selection
) -> None:
    unknown = [name for name in selection if strip_wrappers(name) not in uses]
    if unknown:
        raise ValueError(
            f"the selection has {len(unknown)} parameters that the model lacks (the first is {unknown[0]!r}); "
            "it was made for another model"
        )
    for name, mask in masks.items():
        parameter = parameters[name]
        if mask.shape != tuple(parameter.shape):
            raise ValueError(
                f"the mask of {name} is for shape {list(mask.shape)}, the parameter has {list(parameter.shape)}; "
                "select on this model"
            )
        if mask.nnz and not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}, which cannot be trained")
        if mask.is_whole or not mask.nnz:
            continue
        for _, module, short in uses[name]:
            if hasattr(module, short + SUFFIX):
                raise ValueError(f"{name}: the module has an attribute {short + SUFFIX} already, attach() needs it")
            if getattr(module, "max_norm", None) is not None:
                raise ValueError(f"{name}: max_norm rescales the whole weight in forward; set it to None, or freeze it")
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"{name}: its module is TorchScript, whose class cannot change; use the Python module")


def detach(model: nn.Module, restore: bool = False) -> nn.Module:
    """Takes back what :func:`attach` did: the modules, parameters and ``requires_grad`` flags are those of before.

    Args:
        model: the attached model, or a wrapper around it.
        restore: give every trained parameter its original entries back, to the bit; else it stays as trained. Buffers
            (running statistics) are left as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not attached.
    """
    roots = [module for module in model.modules() if RECORD in vars(module)]
    if not roots:
        raise ValueError("the model is not attached, or attach() was called on a module around it; pass that one")
    for root in roots:
        record: Record = vars(root)[RECORD]
        parameters = _parameters_of(parameter_uses(root))  # without any that the caller has replaced since
        with torch.no_grad():
            for name, original in record.wholes.items():
                if restore and name in parameters:
                    parameters[name].copy_(original)
        for module in root.modules():
            if isinstance(module, Attached):
                detach_module(module, restore)
        for name, flag in record.flags.items():
            if name in parameters:
                parameters[name].requires_grad_(flag)
        delattr(root, RECORD)
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer: values and whole parameters, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sync(model: nn.Module) -> None:
    """Writes all values to their weights. Needed after changing values by anything but a ``torch.optim`` optimizer."""
    for module in model.modules():
        if isinstance(module, Attached):
            sync_module(module)
