"""The classes of attached modules, and how a module computes the gradient of a partly selected parameter.

An attached module keeps its parameters and state_dict keys. It owns one more parameter for each that is trained in
part, ``<name>_values``, the selected entries; the weight itself is frozen, and always up to date. Gradients take one
of two routes. The direct one, for Linear, Conv, Embedding and transformers' ``Conv1D``, is a forward of our own (see
:mod:`gradsel.nn.functional`). The harvest, for everything else, forms one dense gradient at a time and keeps the
selected entries. The weight of an attached module is a property, so code that reads it from outside, as
``MultiheadAttention`` reads that of its ``out_proj``, trains it by the harvest as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsel.attached import STATE, SUFFIX, Selected, link, selected_in
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask
from gradsel.masks.weight_grad import Taps
from gradsel.nn import functional
from gradsel.parameters.rules import is_transposed_linear
from gradsel.views import NeuronView

# --- What an attached module owns --------------------------------------------------------------------------------


class Attached:
    """Mixed into the class of every attached module. It must not get in the way of names that the module uses."""

    _parameters: dict[str, nn.Parameter]
    _gradsel_recipe: tuple[Any, type | None, tuple[str, ...]]  # arguments of attached_class()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Moves and casts all parameters, except that values stay in the dtype they are trained in."""
        names = {name: self._parameters[name].dtype for name in selected_in(self)}
        exact = {}
        for name in names:
            values = self._parameters[name + SUFFIX]
            exact[name] = values.data, None if values.grad is None else values.grad.data
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, dtype in names.items():
            weight, values = self._parameters[name], self._parameters[name + SUFFIX]
            for tensor, before in zip((values, values.grad), exact[name], strict=True):
                if tensor is not None and before is not None and tensor.dtype is not trained_dtype(weight):
                    tensor.data = before.to(tensor.device, trained_dtype(weight))
            selected_in(self)[name] = selected_in(self)[name].to(weight.device)
            if weight.dtype is not dtype:
                sync_module(self)  # a weight that was rounded and is wide again gets back the bits that it had lost
        link(self)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        link(self)  # load_state_dict(assign=True) brings parameters of its own
        for name, selected in selected_in(self).items():
            weight, values = self._parameters[name], self._parameters[name + SUFFIX]
            with torch.no_grad():
                if prefix + name + SUFFIX in state_dict:
                    selected.mask.scatter_(weight, values)
                elif prefix + name in state_dict:  # a checkpoint of the plain model
                    values.copy_(selected.mask.gather(weight))
                    if prefix + name + SUFFIX in missing_keys:
                        missing_keys.remove(prefix + name + SUFFIX)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[misc]
        parts += [f"{name}: {s.mask.nnz} selected ({s.mask.kind})" for name, s in selected_in(self).items()]
        return ", ".join(part for part in parts if part)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        link(self)  # deepcopy and pickle make new parameters

    def __reduce_ex__(self, protocol):  # the class is made at run time, so it is pickled by its recipe
        with torch.no_grad():  # recurrent layers put what they read of their weights into their state
            return _empty, self._gradsel_recipe, super().__reduce_ex__(protocol)[2]


def sync_module(module: Any) -> None:
    """Writes the values of an attached module to its weights."""
    with torch.no_grad():
        for name, selected in selected_in(module).items():
            selected.mask.scatter_(module._parameters[name], module._parameters[name + SUFFIX])


def detach_module(module: Any, restore: bool) -> None:
    """Makes an attached module a plain one again."""
    with torch.no_grad():
        for name, selected in selected_in(module).items():
            if restore:
                selected.mask.scatter_(module._parameters[name], selected.original)
            del module._parameters[name + SUFFIX]
    delattr(module, STATE)
    module.__class__ = module._gradsel_recipe[0]


# --- The direct route --------------------------------------------------------------------------------------------


class _Linear:
    """Mixed into Linear."""

    def forward(self: Any, input: Tensor) -> Tensor:
        own = self._parameters
        return functional.linear(input, own["weight"], self.bias, own["weight_values"], selected_in(self)["weight"].how)


class _Conv1D:
    """Mixed into the Conv1D of transformers: a Linear whose weight is stored as [in, out]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        own = self._parameters
        return functional.linear(x, own["weight"].t(), self.bias, own["weight_values"], selected_in(self)["weight"].how)


class _Conv:
    """Mixed into Conv1d, Conv2d and Conv3d."""

    def forward(self: Any, input: Tensor) -> Tensor:
        own, selected = self._parameters, selected_in(self)["weight"]
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = [0] * len(self.kernel_size)
        elif padding == "valid":
            padding = [0] * len(self.kernel_size)
        elif padding == "same":
            total = [d * (size - 1) for d, size in zip(self.dilation, self.kernel_size, strict=True)]
            padding = [both // 2 for both in total]
            input = F.pad(input, [odd for both in reversed(total) for odd in (0, both % 2)])
        how = (self.stride, padding, self.dilation, self.groups)
        return functional.conv(input, own["weight"], self.bias, own["weight_values"], selected.how, selected.taps, *how)


class _Embedding:
    """Mixed into Embedding."""

    def forward(self: Any, input: Tensor) -> Tensor:
        own, how = self._parameters, selected_in(self)["weight"].how
        return functional.embedding(input, own["weight"], own["weight_values"], how, self.padding_idx)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def direct_forward(module: nn.Module) -> type | None:
    """The class whose forward takes the place of the module's own, or None for the harvest.

    A forward of the module's own, or of a subclass, is not known.
    """
    forward = type(module).forward
    if "forward" in vars(module):
        return None
    if forward is nn.Linear.forward and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return _Linear  # the exception is never called: MultiheadAttention reads its weight
    for known in _CONVOLUTIONS:
        if forward is known.forward and type(module)._conv_forward is known._conv_forward:  # type: ignore[attr-defined]
            return _Conv
    if is_transposed_linear(module) and type(module).__module__ == "transformers.pytorch_utils":
        return _Conv1D
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        plain = not module.scale_grad_by_freq and not module.sparse
        return _Embedding if plain else None
    return None


def selected_of(module: nn.Module, name: str, mask: Mask, weight: Tensor, short: str) -> Selected:
    """What a module needs to train its parameter ``short`` by ``mask``."""
    mask = mask.to(weight.device)
    selected = Selected(name, mask, mask.gather(weight.detach()))
    if short != "weight" or direct_forward(module) is None:
        return selected
    if isinstance(module, nn.Embedding):
        selected.how = mask.lookup()
    elif isinstance(module, _CONVOLUTIONS):
        product = mask.product(NeuronView(), module.groups, share=1.0)
        selected.how = product
        selected.taps = Taps.of(product, module.in_channels, module.kernel_size, weight.device)
    else:
        selected.how = mask.product(NeuronView((1,) if is_transposed_linear(module) else (0,)))
    return selected


# --- Classes of attached modules ---------------------------------------------------------------------------------


@cache
def attached_class(base: Any, forward: type | None, names: tuple[str, ...]) -> type:
    """``base`` with selected parameters ``names``, and the forward of a class of the direct route."""
    namespace: dict[str, Any] = {name: _harvested(name) for name in names}
    namespace |= {"_gradsel_recipe": (base, forward, names), "__module__": base.__module__, "__doc__": base.__doc__}
    bases = (Attached, base) if forward is None else (Attached, forward, base)
    return type(f"Selected{base.__name__}", bases, namespace)


def _harvested(name: str) -> property:
    """The attribute through which a weight is read from outside, or by a forward that is not ours."""

    def read(module: Attached) -> Tensor:
        own = module._parameters
        return functional.harvest(own[name], own[name + SUFFIX], selected_in(module)[name].mask)

    return property(read)


def _empty(base: Any, forward: type | None, names: tuple[str, ...]) -> nn.Module:
    """A module without any state: what unpickling begins with."""
    cls: Any = attached_class(base, forward, names)
    return cls.__new__(cls)
