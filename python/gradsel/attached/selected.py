"""A weight that is trained in part, and its values.

:func:`gradsel.attach` leaves the modules of a model as they are. A partly selected weight stays the same object and
becomes a :class:`~gradsel.nn.weights.SelectedWeight`, which knows how it is trained; its module gets one more
parameter, ``<name>_values``, a :class:`SelectedValues`. Both carry the same :class:`Selected`. Values are what is
trained and what counts; :meth:`Selected.refresh` brings the weight up to date, or takes over what somebody else has
written to it.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradsel.dtypes import adopted, differs, trained_dtype
from gradsel.masks import Mask, fingerprint
from gradsel.sharding import Shards

#: What attach() appends to a parameter's name for its values.
SUFFIX = "_values"
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

    def alive(self) -> list[tuple[nn.Module, str]]:
        """The sites, as far as their modules are alive."""
        return [(module, short) for reference, short in self.sites if (module := reference()) is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        memo[id(self)] = made = Original(self.name, self.entries.clone(), self.replaced)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sites": []}


@dataclass(eq=False)
class Masked(Original):
    """A parameter that is trained in part, through values that its sites hold beside it.

    Attributes:
        mask: its selected entries.
    """

    mask: Mask = field(kw_only=True)
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


@dataclass(eq=False)
class Selected(Masked):
    """How the entries of one parameter are trained. Its sites hold both the weight and the values.

    Attributes:
        kind: the class of the parameter.
        direct: what the direct routes need, by route: a Product, a Lookup, or a Product and its Taps.
        seen: the state of values and weight in which they last agreed; see :meth:`refresh`. None: not known.
        unseen: the values lie in a larger block of memory (DeepSpeed keeps all parameters in one), through which they
            can be written unnoticed.
        shards: what this rank holds of weight and values if FSDP has sharded them. A module then has these between
            forwards, and gathered ones during a forward and its backward.
    """

    kind: type = nn.Parameter
    direct: dict[str, Any] = field(default_factory=dict)
    seen: list[int] | None = None
    unseen: bool = False
    shards: Shards | None = None

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
        if self.shards is not None:  # shards agree before they are gathered, and what is gathered nobody writes
            if values is not None and not is_values(values):
                raise RuntimeError(
                    f"{self.name}{SUFFIX} has been replaced (functional_call does so) in a model that is sharded; "
                    "write to it in place instead"
                )
            return None if values is None else self.shards.in_forward(values)
        if not isinstance(values, SelectedValues):
            return values
        now = self.state_of(weight, values)
        if (now == self.seen and not self.unseen) or values.is_meta or weight.is_meta or _is_faked():
            return values
        if now == self.seen:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
                self.mask.scatter_(weight, values)
            return values
        values_changed = self.seen is None or now[:3] != self.seen[:3]
        weight_changed = self.seen is None or now[3:] != self.seen[3:]
        if weight_changed and (held := self.weight()) is not None and held is not weight:
            return None  # this one was replaced, and somebody still reads it
        self.follow(weight)
        if values.grad is not None and values.grad.dtype != values.dtype:  # the model was cast
            values.grad = values.grad.to(values.dtype)
        with torch.no_grad():
            if not weight_changed:
                self.mask.scatter_(weight, values)
            else:
                entries = self.mask.gather(weight)
                if not values_changed:
                    values.copy_(adopted(values, entries))
                elif bool(differs(entries, values.detach().to(entries.dtype)).any()):
                    self.mask.scatter_(weight, values)
        self.mark(weight, values)
        return values

    def follow(self, weight: Tensor) -> None:
        """Moves masks to the weight's device, and originals, too, unless it is sharded: no forward needs them.

        Nothing is moved to where nothing can be kept.
        """
        device = weight.device
        if weight.is_meta:
            return
        if self.mask.device != device:
            before, self.mask = self.mask, self.mask.to(device)
            shared = list(zip(before.tensors().values(), self.mask.tensors().values(), strict=True))
            self.direct = {route: _moved(needed, device, shared) for route, needed in self.direct.items()}
        if self.shards is None and self.entries.device != device:
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
        if self.shards is not None:
            self.shards.write()
            return
        self.mask.scatter_(weight, values)
        self.mark(weight, values)

    def mark(self, weight: Tensor, values: Tensor) -> None:
        """Weight and values agree now."""
        self.seen = self.state_of(weight, values)
        self.unseen = lies_in_a_block(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Selected:
        made = Selected(self.name, self.entries.clone(), self.replaced, mask=self.mask, kind=self.kind)
        made.direct = self.direct
        memo[id(self)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seen": None, "shards": None}


def lies_in_a_block(values: Tensor) -> bool:
    """Whether there is more in the same memory."""
    return values.untyped_storage().nbytes() > values.nbytes


def _is_faked() -> bool:
    """Whether operators run on fake tensors, so that nothing can be written."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, FakeTensorMode) for mode in modes)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _moved(needed: Any, device: torch.device, shared: list[tuple[Tensor, Tensor]]) -> Any:
    if isinstance(needed, tuple):
        return tuple(each.to(device, shared) for each in needed)
    return needed.to(device, shared)


class SelectedValues(nn.Parameter):
    """The selected entries of a weight, in mask order: an ordinary small parameter, except for ``data``.

    In-place writes through ``data``, as weight averages make them, are noticed like any other. A cast of the model
    leaves values in the dtype they are trained in, and exact. Pickled without their module, they are a plain parameter.
    """

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        """A plain parameter: accelerate, for one, replaces parameters by calling their class."""
        return nn.Parameter(torch.empty(0) if data is None else data, requires_grad)

    @property
    def data(self) -> Tensor:
        return self.detach()  # unlike Tensor.data, it shares the version counter

    @data.setter
    def data(self, new: Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, uncast(new, self.detach()))  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)
        if (selected := vars(self).get(LINK)) is not None:
            selected.unseen = lies_in_a_block(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectedValues:
        if id(self) not in memo:
            memo[id(self)] = made = values_of(self.detach().clone(), self.requires_grad)
            vars(made)[LINK] = copy.deepcopy(vars(self)[LINK], memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unlinked(self).__reduce_ex__(protocol)


def values_of(entries: Tensor, requires_grad: bool = True) -> SelectedValues:
    """A parameter of these entries."""
    return torch.Tensor._make_subclass(SelectedValues, entries, requires_grad)


def unlinked(parameter: Tensor) -> nn.Parameter:
    """A plain parameter that shares the entries of a weight or of values."""
    plain = nn.Parameter(parameter.detach(), parameter.requires_grad)
    vars(plain).update({key: held for key, held in vars(parameter).items() if key != LINK})
    return plain


def uncast(new: Tensor, values: Tensor) -> Tensor:
    """New values in the dtype that values are trained in: where they are a cast of the present ones, exactly those."""
    dtype = trained_dtype(new)
    if new.dtype is dtype:
        return new
    cast = values.to(new.device, new.dtype)
    is_cast = new.shape == cast.shape and not bool(differs(new, cast).any())
    return values.to(new.device, dtype) if is_cast else new.to(dtype)


def is_values(parameter: Tensor) -> bool:
    """Whether a parameter holds values, in one piece or sharded."""
    if isinstance(parameter, SelectedValues):
        return True
    selected: Selected | None = vars(parameter).get(LINK)
    return selected is not None and selected.shards is not None and selected.shards.values is parameter
