"""What is attached: the record that every other room asks, and the way from values to their weight and back.

:func:`gradsel.attach` leaves the modules of a model as they are. A partly selected weight stays the same object and
becomes a :class:`~gradsel.nn.weights.SelectedWeight`, which knows how it is trained; its module gets one more
parameter, ``<name>_values``, a :class:`SelectedValues`. Both carry the same :class:`Selected`. Values are what is
trained and what counts; :meth:`Selected.refresh` brings the weight up to date, or takes over what somebody else has
written to it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, fingerprint
from gradsel_kernels._warnings import user_stacklevel

#: What attach() appends to a parameter's name for its values.
SUFFIX = "_values"
#: The attribute of a module with what attach() did to its parameters.
STATE = "_gradsel_attached"
#: The attribute of the module that attach() was called on.
RECORD = "_gradsel_record"
#: The attribute by which a weight and its values know their :class:`Selected`.
LINK = "_gradsel_selected"
#: Where :meth:`Selected.state_of` has the versions.
VALUES_VERSION, WEIGHT_VERSION = 1, 3


@dataclass(eq=False)
class Original:
    """A trained parameter as it was before training; where it is trained in part, a :class:`Selected`.

    Attributes:
        name: the parameter's name when attach() was called.
        entries: its trained entries before training, in the parameter's dtype.
        replaced: the originals before a plain checkpoint was loaded; see :mod:`gradsel.nn.loading`.
        sites: the modules that hold the parameter (weak references), and its name in each.
    """

    name: str
    entries: Tensor
    replaced: Tensor | None = None
    sites: list[tuple[weakref.ref[nn.Module], str]] = field(default_factory=list)

    def elsewhere(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """The sites in other modules, as far as they are alive."""
        alive = [(reference(), short) for reference, short in self.sites]
        return [(other, short) for other, short in alive if other is not None and other is not module]

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        memo[id(self)] = made = Original(self.name, self.entries.clone(), self.replaced)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sites": []}


@dataclass(eq=False)
class Selected(Original):
    """How one parameter is trained in part. Its sites hold both the weight and the values.

    Attributes:
        mask: its selected entries.
        kind: the class of the parameter.
        direct: what the direct routes need, by route: a Product, a Lookup, or a Product and its Taps.
        seen: the state of values and weight in which they last agreed; see :meth:`refresh`. None: not known.
    """

    mask: Mask = field(kw_only=True)
    kind: type = nn.Parameter
    direct: dict[str, Any] = field(default_factory=dict)
    seen: list[int] | None = None
    _fingerprint: int | None = None

    def fingerprint(self) -> int:
        """That of the mask."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.mask)
        return self._fingerprint

    def values(self) -> Tensor | None:
        """The values as a module holds them now; None if no module does."""
        for reference, short in self.sites:
            module = reference()
            if module is not None and (found := module._parameters.get(short + SUFFIX)) is not None:
                return found
        return None

    def weight(self) -> Tensor | None:
        """The weight as a module holds it now, under its own name or, pruned or renamed, under another."""
        for reference, short in self.sites:
            module = reference()
            if module is None:
                continue
            own = module._parameters
            for candidate in (own.get(short), *own.values()):
                if candidate is not None and vars(candidate).get(LINK) is self and not is_values(candidate):
                    return candidate
        return None

    def refresh(self, weight: Tensor) -> Tensor | None:
        """Makes weight and values agree again if either has changed since they last did.

        Whoever writes values changes the weight's selected entries; whoever writes the weight changes the values, to
        the bit where the weight holds something else than the rounded value. If both have changed and differ, values
        count: every access to the weight through torch's Python interface refreshes first, so they are the later ones.

        Args:
            weight: the parameter that carries this record. torch functions are not overridden around this call.

        Returns:
            The values, or what torch.func.functional_call has put in their place, which is not written to the weight.
        """
        values = self.values()
        if not isinstance(values, SelectedValues):
            return values
        now = self.state_of(weight, values)
        if now == self.seen or values.is_meta or weight.is_meta or _is_faked():
            return values
        values_changed = self.seen is None or now[:3] != self.seen[:3]
        weight_changed = self.seen is None or now[3:] != self.seen[3:]
        self.follow(weight)
        if values.grad is not None and values.grad.dtype != values.dtype:  # the model was cast
            values.grad = values.grad.to(values.dtype)
        with torch.no_grad():
            if not weight_changed:
                self.mask.scatter_(weight, values)
            else:
                entries, rounded = self.mask.gather(weight), values.detach().to(weight.dtype)
                differs = (entries != rounded) & ~(entries.isnan() & rounded.isnan())
                if not values_changed:
                    values.copy_(torch.where(differs, entries.to(values.dtype), values))
                elif bool(differs.any()):
                    self.mask.scatter_(weight, values)
        self.mark(weight, values)
        return values

    def follow(self, weight: Tensor) -> None:
        """Moves masks and originals to the weight's device and dtype."""
        if self.entries.device != weight.device:
            device = weight.device
            self.mask = self.mask.to(device)
            self.direct = {route: _moved(needed, device) for route, needed in self.direct.items()}
            self.entries = self.entries.to(device)
            if self.replaced is not None:
                self.replaced = self.replaced.to(device)

    @staticmethod
    def state_of(weight: Tensor, values: Tensor) -> list[int]:
        """What changes when anybody writes values or weight: three numbers of the values, three of the weight."""
        try:
            versions = values._version, weight._version
        except RuntimeError:  # made in inference mode
            versions = _version(values), _version(weight)
        return [id(values), versions[0], values.data_ptr(), versions[1], weight.data_ptr(), id(weight)]

    def is_swapped(self, weight: Tensor) -> bool:
        """Whether this is the weight as it was, but for what torch.utils.swap_tensors has exchanged in it."""
        return self.seen is not None and self.seen[-1] == id(weight) and type(weight) is nn.Parameter

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Writes the values to the weight."""
        self.mask.scatter_(weight, values)
        self.mark(weight, values)

    def mark(self, weight: Tensor, values: Tensor) -> None:
        """Weight and values agree now."""
        self.seen = self.state_of(weight, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Selected:
        made = Selected(self.name, self.entries.clone(), self.replaced, mask=self.mask, kind=self.kind)
        made.direct = self.direct
        memo[id(self)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seen": None}


def _is_faked() -> bool:
    """Whether operators run on fake tensors, so that nothing can be written."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, FakeTensorMode) for mode in modes)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _moved(needed: Any, device: torch.device) -> Any:
    if isinstance(needed, tuple):
        return tuple(each.to(device) for each in needed)
    return needed.to(device)


class SelectedValues(nn.Parameter):
    """The selected entries of a weight, in mask order: an ordinary small parameter, except for ``data``.

    In-place writes through ``data``, as weight averages make them, are noticed like any other. A cast of the model
    leaves values in the dtype they are trained in, and exact.
    """

    @property
    def data(self) -> Tensor:
        return self.detach()  # unlike Tensor.data, it shares the version counter

    @data.setter
    def data(self, new: Tensor) -> None:
        dtype = trained_dtype(new)
        if new.dtype is not dtype:
            cast = self.detach().to(new.device, new.dtype)
            is_cast = new.shape == cast.shape and bool(((new == cast) | (new.isnan() & cast.isnan())).all())
            new = self.detach().to(new.device, dtype) if is_cast else new.to(dtype)
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectedValues:
        if id(self) not in memo:
            memo[id(self)] = made = values_of(self.detach().clone(), self.requires_grad)
            vars(made)[LINK] = copy.deepcopy(vars(self)[LINK], memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return values_of, (self.detach(), self.requires_grad), vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def values_of(entries: Tensor, requires_grad: bool = True) -> SelectedValues:
    """A parameter of these entries."""
    return torch.Tensor._make_subclass(SelectedValues, entries, requires_grad)


def is_values(parameter: Tensor) -> bool:
    return isinstance(parameter, SelectedValues)


@cache
def _let_optimizers_use_foreach() -> None:
    """torch's optimizers choose their fast implementations for tensors of known types only."""
    with contextlib.suppress(ImportError):  # private, and of no consequence but speed
        from torch.optim.optimizer import _foreach_supported_types

        _foreach_supported_types.append(SelectedValues)


# --- What modules hold -------------------------------------------------------------------------------------------


class Attachments:
    """What attach() did to the parameters of one module, by their names in it.

    Attributes:
        flags: requires_grad before.
        partial: those trained in part.
        whole: those trained whole.
        record: of the module that attach() was called on.
    """

    def __init__(self, module: nn.Module, record: Record) -> None:
        self.module = weakref.ref(module)
        self.record = record
        self.flags: dict[str, bool] = {}
        self.partial: dict[str, Selected] = {}
        self.whole: dict[str, Original] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        module = memo[id(self.module())]
        made = Attachments(module, copy.deepcopy(self.record, memo))
        made.flags = dict(self.flags)
        for short, original in (self.partial | self.whole).items():
            made.add(short, copy.deepcopy(original, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, module=weakref.ref(state["module"]), partial={}, whole={})
        for short, original in (state["partial"] | state["whole"]).items():
            self.add(short, original)
        watch_optimizers()

    def add(self, short: str, original: Original) -> None:
        """Makes this module one of those that hold a parameter."""
        if isinstance(original, Selected):
            self.partial[short] = original
        else:
            self.whole[short] = original
        module = self.module()
        assert module is not None
        original.sites.append((weakref.ref(module), short))


@dataclass(eq=False)
class Record:
    """Kept by the module that attach() was called on.

    Attributes:
        trained: names of all trained parameters when attach() was called.
        resuming: the last load_state_dict() brought values: shards of the same checkpoint may follow.
        loading: the kind of checkpoint that is being loaded, "attached" or "plain".
        ranks_agree: the masks of all ranks have been compared.
    """

    trained: list[str]
    resuming: bool = False
    loading: str | None = None
    ranks_agree: bool = False


def attachments_of(module: nn.Module) -> Attachments | None:
    """What attach() did to a module, if anything."""
    return vars(module).get(STATE)


def selected_in(module: nn.Module) -> dict[str, Selected]:
    """How the parameters of a module are trained in part, by their names in it; nothing in one that is not attached."""
    attachments = attachments_of(module)
    return {} if attachments is None else attachments.partial


def is_attached(model: nn.Module) -> bool:
    """Whether attach() was called on the model, or on a module in or around it."""
    return any(attachments_of(module) is not None or RECORD in vars(module) for module in model.modules())


def attached_root(model: nn.Module) -> nn.Module | None:
    """The module that attach() was called on: the model or one inside it; None if there is none.

    Raises:
        ValueError: there are several.
    """
    roots = [module for module in model.modules() if RECORD in vars(module)]
    if len(roots) > 1:
        raise ValueError(f"{len(roots)} modules of the model are attached, each on its own; pass one of them")
    return roots[0] if roots else None


def require_complete(root: nn.Module, what: str) -> None:
    """Refuses an attached model from which trained parameters have disappeared.

    Raises:
        ValueError: it names them.
    """
    found: set[str] = set()
    for module in root.modules():
        attachments = attachments_of(module)
        if attachments is not None:
            found |= {s.name for short, s in attachments.partial.items() if s.weight() is not None}
            for short, original in attachments.whole.items():
                whole = module._parameters.get(short)
                if whole is not None and whole.shape == original.entries.shape:
                    found.add(original.name)
    missing = [name for name in vars(root)[RECORD].trained if name not in found]
    if missing:
        raise ValueError(
            f"{what}: {len(missing)} trained parameters are no longer part of the model, or have another shape, first "
            f"{missing[0]}; put their modules back, or call gradsel.detach(model) and attach anew"
        )


# --- From values to their weight: for optimizers, which know parameters and not modules -------------------------


def owner_of(parameter: Tensor) -> tuple[Tensor, Selected] | None:
    """The weight that ``parameter`` holds values of, and how they are selected; None for any other parameter.

    Raises:
        RuntimeError: the model holds other values instead of these.
    """
    selected: Selected | None = vars(parameter).get(LINK) if isinstance(parameter, SelectedValues) else None
    if selected is None:
        return None
    current = selected.values()
    if current is not parameter and current is not None:
        raise RuntimeError(
            f"the optimizer holds values of {selected.name} that the model no longer has: {selected.name}{SUFFIX} is "
            f"now a {type(current).__name__} of its own, so training would have no effect. Make the optimizer after "
            "whatever replaces parameters (load_state_dict(assign=True), for example); FSDP and tensor parallelism are "
            "not supported on an attached model"
        )
    if current is None:
        return None
    weight = selected.weight()
    if weight is None:
        raise RuntimeError(
            f"{selected.name} has been replaced or taken away since attach(), so {selected.name}{SUFFIX} no longer "
            "trains anything; assign to the module's attribute or write to the weight in place, or call "
            "gradsel.detach(model)"
        )
    return weight, selected


def links_of(parameter: Tensor) -> list[tuple[dict, str, Any]]:
    """Where :func:`owner_of` found its answer: while these keys of these dicts hold these objects, it is the same."""
    selected: Selected | None = vars(parameter).get(LINK)
    if selected is None:
        return []
    found: list[tuple[dict, str, Any]] = [(vars(parameter), LINK, selected), (vars(selected), "mask", selected.mask)]
    for reference, short in selected.sites:
        module = reference()
        if module is not None and module._parameters.get(short + SUFFIX) is parameter:
            own = module._parameters
            found += [(own, name, own[name]) for name in (short, short + SUFFIX) if name in own]
            break
    return found


def _owned(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, Selected]]:
    """Values, weight and selection of all values that an optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = owner_of(parameter)
            if owner is not None:
                yield (parameter, *owner)


@torch.no_grad()
def _write(optimizer: Optimizer) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for values, weight, selected in _owned(optimizer):
            selected.write(weight, values)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Closures see the weights that the optimizer tries, not those before the step (LBFGS)."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or next(_owned(optimizer), None) is None:
        return None

    def synced() -> Any:
        _write(optimizer)
        return closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": synced}
    return (args[0], synced, *args[2:]), kwargs


_stepped: weakref.WeakSet = weakref.WeakSet()


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not getattr(optimizer, "writes_weights", False):
        _write(optimizer)
    if optimizer not in _stepped:
        _stepped.add(optimizer)
        _report_unreached(optimizer)


def _report_unreached(optimizer: Optimizer) -> None:
    """Names the values that the first backward has not reached, and weights that are held without their values."""
    owned = list(_owned(optimizer))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    alone = [
        selected.name
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (selected := vars(parameter).get(LINK)) is not None
        and not is_values(parameter)
        and id(selected.values()) not in held
        and selected.values() is not None
    ]
    if alone:
        warnings.warn(
            f"the optimizer holds {_some(alone)}, whose selected entries are trained through {alone[0]}{SUFFIX}, which "
            "it does not hold: they stay as they are. Pass gradsel.trainable_parameters(model)",
            stacklevel=user_stacklevel(),
        )
    undecayed = [
        selected.name
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (selected := vars(parameter).get(LINK)) is not None
        and is_values(parameter)
        and parameter.ndim < 2 <= len(selected.mask.shape)
        and not group.get("weight_decay")
    ]
    if undecayed and any(group.get("weight_decay") for group in optimizer.param_groups):
        warnings.warn(
            f"the values of {_some(undecayed)} have one dimension, although they stand for entries of matrices, and "
            "are in a group without weight decay, like biases. If the groups were made by p.dim() >= 2, go by names",
            stacklevel=user_stacklevel(),
        )
    unreached = [selected.name for values, _, selected in owned if values.grad is None]
    if unreached and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        warnings.warn(
            f"{len(unreached)} of {len(owned)} selected weights got no gradient in the first backward: "
            f"{_some(unreached)}. Either the loss does not depend on them, or the model reads them in a way that "
            "attach() cannot see.",
            stacklevel=user_stacklevel(),
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def watch_optimizers() -> None:
    """Makes every ``torch.optim`` optimizer write values to their weights, and looks at each once more."""
    _stepped.clear()
    _register_hooks()


@cache
def _register_hooks() -> None:
    _let_optimizers_use_foreach()
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
