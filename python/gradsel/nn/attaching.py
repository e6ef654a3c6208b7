"""attach(): a model that trains what a selection says, and forms no other gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsel.attached import (
    LINK,
    RECORD,
    STATE,
    SUFFIX,
    Attachments,
    Differences,
    Original,
    Record,
    Selected,
    differences_in,
    is_attached,
    no_differences,
    selected_in,
    values_of,
    watch_optimizers,
)
from gradsel.dtypes import trained_dtype
from gradsel.interrupts import uninterrupted
from gradsel.masks import Mask
from gradsel.nn.buffers import keep_buffers
from gradsel.nn.direct import direct_route, needed_by
from gradsel.nn.hooks import hook, hook_root
from gradsel.nn.quantised import Attached
from gradsel.nn.sharding import link_shards, require_alike, sharded_values
from gradsel.nn.weights import SelectedWeight
from gradsel.parameters.claimed import require_unclaimed
from gradsel.parameters.names import Use, parameter_uses, quantised_in, strip_wrappers, uncompiled
from gradsel.parameters.trainable import require_trainable
from gradsel.quantised import Quantised, install, installed, weight_parameter, why_unknown
from gradsel.selection.selection import Selection, lookup
from gradsel.sharding import is_managed, is_sharded, reshard
from gradsel.tables import grouped, shape_text, table
from gradsel.views import NeuronView
from gradsel_kernels._warnings import user_stacklevel


@dataclass
class Route:
    """How one parameter is trained.

    Attributes:
        route: "direct", "harvest", "differences" (a quantised weight), "whole" or "frozen".
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
        added = sum(r.route == "differences" for r in self.values())
        lines.append(f"{sum(r.trained for r in self.values()):,} entries trained; {direct} parameters by the direct "
                     f"route, {harvest} by the harvest of a dense gradient"
                     + (f", {added} by differences from quantised weights" if added else ""))  # fmt: skip
        return "\n".join(lines)


@torch.inference_mode(False)  # what is made in it could not be trained
def attach(model: nn.Module, selection: Selection) -> AttachReport:
    """Makes a model train what a selection says, without dense gradients. In place.

    A partly selected weight is frozen and gets a parameter of its selected entries, ``<name>_values``, in float32
    (float64 for float64); parameters selected whole are trained as they are; all others are frozen. Modules keep their
    classes and forwards, parameters stay the same objects.

    A quantised weight stays quantised. Its ``<name>_values`` are float32 *differences* from the dequantised weight,
    which start at zero, and its module gets a forward that adds them (docs/quantised.md).

    Give ``trainable_parameters(model)`` to an optimizer, to
    :class:`~gradsel.optim.MaskedAdam` best of all. Attach before wrapping the model in DistributedDataParallel, and
    make the optimizer afterwards. Of ``torch.compile(model)``, the model inside is attached.

    Values are what counts. In eager mode, whatever writes to them is in the weight before its next use, and whatever
    writes to the selected entries of the weight is taken over by the values. Under ``torch.compile`` only steps of
    ``torch.optim`` optimizers, of DeepSpeed's ZeRO and ``load_state_dict()`` are; call :func:`sync` after any other
    change.

    ``state_dict()`` has the keys of the plain model and ``<name>_values`` beside them, so that training goes on exactly
    where it stopped; :func:`gradsel.export` writes the plain model, and so does ``model.save_pretrained()`` of
    transformers. Loading a plain checkpoint makes it the new base.

    Args:
        model: any module.
        selection: from :func:`gradsel.select` on this model.

    Returns:
        Which parameter is trained by which route.

    Raises:
        KeyError, ValueError: the selection is for another model, the model is attached already, is wrapped in
            DistributedDataParallel or belongs to a DeepSpeed engine, or a selected parameter cannot be trained; nothing
            has changed.
    """
    model = uncompiled(model)
    require_unclaimed(model)
    if is_attached(model):
        raise ValueError("the model is attached already; call gradsel.detach(model) first")
    reshard(model)
    uses = parameter_uses(model)
    masks = {name: lookup(selection, name) for name in uses}
    parameters = _parameters_of(uses)
    quantised = quantised_in(uses)
    _check(masks, parameters, uses, selection, quantised)
    require_alike(masks, parameters)

    routes: dict[str, Route] = {}
    values: dict[str, nn.Parameter] = {}
    partial: dict[str, Selected] = {}
    differences: dict[str, Differences] = {}
    whole: dict[str, Original] = {}
    attached: dict[nn.Module, Attachments] = {}
    record = Record([name for name, mask in masks.items() if mask.nnz])
    for name, mask in masks.items():
        parameter = parameters[name]
        trained_in_part = bool(mask.nnz) and not mask.is_whole
        if trained_in_part and name in quantised:
            mask = mask.to(parameter.device)
            differences[name] = Differences(
                name,
                no_differences(mask, parameter.device),
                mask=mask,
                product=mask.product(NeuronView()),
                quantised=quantised[name].fingerprint(),
            )
            routes[name] = Route("differences", quantised[name].kind, mask.shape, mask.nnz)
        elif trained_in_part:
            if is_sharded(parameter):
                values[name], original = sharded_values(mask, parameter)
            else:
                mask = mask.to(parameter.device)
                original = mask.gather(parameter.detach())
                values[name] = values_of(original.to(trained_dtype(parameter), copy=True))
            partial[name] = Selected(name, original, mask=mask, kind=type(parameter))
            vars(values[name])[LINK] = partial[name]
        else:
            routes[name] = Route("whole" if mask.nnz else "frozen", mask.label, mask.shape, mask.nnz)
        for _, module, short in uses[name]:
            attachments = attached.setdefault(module, Attachments(module, record))
            attachments.flags[short] = parameter.requires_grad
            if name in differences:
                attachments.add(short, differences[name])
            elif trained_in_part:
                attachments.add(short, partial[name])
                route = direct_route(module, short)
                if route is not None:
                    partial[name].direct[route] = needed_by(module, route, mask)
                if name not in routes or route is None:
                    kind = "harvest" if route is None else "direct"
                    routes[name] = Route(kind, type(module).__name__, mask.shape, mask.nnz)
            elif mask.nnz:
                attachments.add(short, whole.setdefault(name, Original(name, parameter.detach().clone())))

    # Nothing has changed so far; from here on nothing fails.
    watch_optimizers()
    with uninterrupted():
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in whole)
            if name not in whole:
                parameter.grad = None
        for name, selected in partial.items():
            weight = parameters[name]
            vars(weight)[LINK] = selected
            if is_sharded(weight):
                managed = any(is_managed(module) for _, module, _ in uses[name])
                link_shards(selected, weight, values[name], record, managed)
            else:
                weight.__class__ = SelectedWeight
            for _, module, short in uses[name]:
                module.register_parameter(short + SUFFIX, values[name])
        for name, each in differences.items():
            added = nn.Parameter(each.entries.clone())
            for _, module, short in uses[name]:
                module.register_parameter(short + SUFFIX, added)
                install(module, Attached(module, each))
        setattr(model, RECORD, record)
        keep_buffers(model)
        hook_root(model)  # first: it decides for all others what kind of checkpoint is loaded
        for module, attachments in attached.items():
            setattr(module, STATE, attachments)
            hook(module, attachments)
        for name, selected in partial.items():
            with torch._C.DisableTorchFunctionSubclass():
                if selected.shards is None:
                    selected.mark(parameters[name], values[name])
                else:
                    selected.shards.mark()
    return AttachReport({name: routes[name] for name in masks})


def _parameters_of(uses: Mapping[str, list[Use]]) -> dict[str, nn.Parameter]:
    return {name: weight_parameter(module, short) for name, ((_, module, short), *_) in uses.items()}


def _check(
    masks: Mapping[str, Mask],
    parameters: Mapping[str, Tensor],
    uses: Mapping[str, list[Use]],
    selection: Selection,
    quantised: Mapping[str, Quantised],
) -> None:
    unknown = [name for name in selection if strip_wrappers(name) not in uses]
    if unknown:
        raise ValueError(
            f"the selection has {len(unknown)} parameters that the model lacks (the first is {unknown[0]!r}); "
            "it was made for another model"
        )
    is_managed_here = any(is_managed(module) for found in uses.values() for _, module, _ in found)
    for name, mask in masks.items():
        parameter = parameters[name]
        shape = quantised[name].shape if name in quantised else tuple(parameter.shape)
        if mask.shape != shape:
            raise ValueError(
                f"the mask of {name} is for shape {list(mask.shape)}, the parameter has {list(shape)}; "
                "select on this model"
            )
        if not mask.nnz:
            continue
        if name in quantised:
            _check_quantised(name, mask, uses[name], parameter)
        else:
            require_trainable(name, parameter, why_unknown(uses[name][0][1], parameter))
        if mask.is_whole:
            continue
        if is_managed_here and not is_sharded(parameter):
            raise ValueError(
                f"{name} is no part of what FSDP shards of this model (ignored_params, or a module outside), so the "
                "gradient of its values would not be reduced: "
                + ("attach() before fully_shard()" if name in quantised else "let fully_shard() shard it, or freeze it")
            )
        if name in quantised:
            continue
        for _, module, short in uses[name]:
            if hasattr(module, short + SUFFIX):
                raise ValueError(f"{name}: the module has an attribute {short + SUFFIX} already, attach() needs it")
            if getattr(module, "max_norm", None) is not None:
                raise ValueError(f"{name}: max_norm rescales the whole weight in forward; set it to None, or freeze it")
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"{name}: its module is TorchScript, which cannot be attached; use the Python module")


def _check_quantised(name: str, mask: Mask, uses: list[Use], parameter: Tensor) -> None:
    if is_sharded(parameter):
        raise ValueError(f"{name} is quantised and a DTensor already: attach() before fully_shard()")
    if mask.is_whole:
        raise ValueError(f"{name} is quantised, so a choice of its entries can be trained, but not all of them")
    for _, module, short in uses:
        if installed(module) is not None:
            raise ValueError(f"{name}: a delta has been applied to this quantised weight; revert it before attach()")
        if hasattr(module, short + SUFFIX):
            raise ValueError(f"{name}: the module has an attribute {short + SUFFIX} already, attach() needs it")
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"{name}: the forward of its module has been replaced by {vars(module)['forward']!r}, and attach() "
                "needs to replace that of a quantised layer; take it back, or freeze this weight by name"
            )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer: values and whole parameters, each once.

    Warns of values that somebody has frozen.
    """
    frozen = [
        each.name
        for module in model.modules()
        for short, each in (selected_in(module) | differences_in(module)).items()
        if (values := module._parameters.get(short + SUFFIX)) is not None and not values.requires_grad
    ]
    if frozen:
        warnings.warn(
            f"values of {len(frozen)} attached weights do not require gradients and will not be trained, first "
            f"{frozen[0]}{SUFFIX}. PEFT's get_peft_model and prepare_model_for_kbit_training freeze all parameters: "
            "call them before attach()",
            stacklevel=user_stacklevel(),
        )
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sync(model: nn.Module, writing: bool = True) -> None:
    """Writes all values to their weights.

    Eager forwards do that by themselves; needed after changing values of a compiled model by anything but a
    ``torch.optim`` optimizer, or through memory that torch does not see (NumPy, DLPack).

    Args:
        writing: also where nothing seems to have changed.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        for module in model.modules():
            for selected in selected_in(module).values():
                weight, values = selected.weight(), selected.values()
                if weight is None or values is None:
                    continue
                if selected.shards is not None:
                    selected.shards.refresh()
                else:
                    selected.refresh(weight)
                if writing:
                    selected.write(weight, values)
