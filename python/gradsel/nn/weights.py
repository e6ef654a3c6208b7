"""The weight of an attached module: a parameter that knows which of its entries are trained, and how.

It is frozen and holds the dense weight. Where a differentiable function reads it with gradients on, the gradient of
the selected entries goes to its values, whichever module calls the function. Linear layers, convolutions, embeddings
and transformers' ``Conv1D`` take the direct route, which computes the selected entries only
(:mod:`gradsel.nn.functional`); everything else takes the harvest, which forms one dense gradient and keeps them.
Everything else that can be done with a parameter works as on any other, or is refused with the way out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from gradsel.attached import LINK, SUFFIX, Selected, is_values
from gradsel.attached.selected import unlinked
from gradsel.nn import functional
from gradsel.parameters.claimed import ADVICE, is_partitioned


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Functions that look at a tensor without reading its entries.
_METADATA = _names(
    """size dim ndimension nelement numel stride storage_offset element_size get_device __len__ __hash__ has_names
    _use_count new_empty new_zeros new_ones new_full new zeros_like ones_like empty_like full_like rand_like
    randn_like randint_like sparse_dim dense_dim"""
)
#: Functions that read entries but have no gradient, or give access to the memory.
_PLAIN = _names(
    """detach numpy tolist item data_ptr untyped_storage storage _typed_storage __array__ __repr__ __format__ __str__
    __dlpack__ __dlpack_device__ equal allclose isclose __bool__ __contains__ type"""
)
_IN_PLACE = _names(
    """__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__"""
)
_REFUSED = _names("register_hook register_post_accumulate_grad_hook retain_grad backward")
#: Attributes that are the entries in another arrangement.
_VIEWS = _names("T mT H mH real imag")


class SelectedWeight(nn.Parameter):
    """A frozen parameter whose selected entries are trained through ``<name>_values``.

    Pickled without its module, it is a plain parameter.
    """

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        """A plain parameter: accelerate, for one, replaces parameters by calling their class."""
        return nn.Parameter(torch.empty(0) if data is None else data, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if functional.forms_gradients():
                direct = _DIRECT.get(func)
                if direct is not None and (result := direct(*args, **kwargs)) is not None:
                    return result
            if torch.compiler.is_dynamo_compiling():
                looks = func.__name__ in _METADATA or (func.__name__ == "__get__" and not _is_view(func))
                return func(*args, **kwargs) if looks else _read(func, args, kwargs)
            return _called(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectedWeight:
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                selected_of(self).refresh(self)
                made = torch.Tensor._make_subclass(SelectedWeight, self.detach().clone(), False)
            memo[id(self)] = made
            vars(made)[LINK] = copy.deepcopy(vars(self)[LINK], memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            selected_of(self).refresh(self)
            return unlinked(self).__reduce_ex__(protocol)


def selected_of(weight: Tensor) -> Selected:
    """How a selected weight is trained."""
    found: Selected = weight._gradsel_selected  # type: ignore[attr-defined]  # LINK; torch.compile knows no vars()
    return found


def _called(func: Callable, args: tuple, kwargs: dict) -> Any:
    """A function of torch with selected weights among its arguments."""
    if not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()):
        for weight in _weights_in((*args, *kwargs.values())):
            _require_no_lost_gradient(weight)  # in the forward of an autograd function, and nowhere else
    if func in _DIRECT:
        return _read(func, args, kwargs)
    name = func.__name__.partition(".")[0]  # without the overload of an operator of torch.ops
    if name == "__get__":
        return _get(func, args)
    if name == "__set__":
        return _set(func, *args)
    if name in _REFUSED or func is torch.autograd.grad:
        return _refuse(func, args, kwargs)
    if name == "requires_grad_":
        return _set_requires_grad(args[0], *args[1:], **kwargs)
    if name in _METADATA or name.startswith(("is_", "_is_")):
        return func(*args, **kwargs)
    if name == "detach" and sys._getframe(2).f_code is nn.Parameter.__new__.__code__:
        name = selected_of(args[0]).name
        raise RuntimeError(
            f"nn.Parameter() of {name}, which is attached: its selected entries are trained through {name}{SUFFIX}. "
            "For a parameter of its own, pass weight.detach().clone(); to reparametrise or prune the module, call "
            "gradsel.detach(model) first"
        )
    if name in _PLAIN or _writes_weights(name, args, kwargs):
        for weight in _weights_in((*args, *kwargs.values())):
            selected_of(weight).refresh(weight)
        return func(*args, **kwargs)
    return _read(func, args, kwargs)


def _writes_weights(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function writes to the weights themselves, and not to another tensor that reads them."""
    if name not in _IN_PLACE and (not name.endswith("_") or name.endswith("__")):
        return next(_weights_in((kwargs.get("out"),)), None) is not None
    written = args[0] if args else kwargs.get("tensor", kwargs.get("input"))  # nn.init passes tensor=
    return next(_weights_in((written,)), None) is not None


def _get(func: Callable, args: tuple) -> Any:
    attribute = func.__self__.__name__  # type: ignore[attr-defined]
    weight = args[0]
    if attribute == "shape" and sys._getframe(3).f_code is ParametrizationList.__init__.__code__:
        # the first that it does; set_(), by which it writes to the weight later on, calls no torch function
        name = selected_of(weight).name
        raise RuntimeError(
            f"{name} is attached, so it cannot be parametrised: {name}{SUFFIX} stands for entries of the weight, not "
            "of what it would be computed from. Call gradsel.detach(model) first, and select and attach anew afterwards"
        )
    if attribute == "data":
        selected_of(weight).refresh(weight)
        return weight.detach()  # unlike Tensor.data, it shares the version counter: writes are noticed
    if attribute in _VIEWS and functional.forms_gradients():
        return _read(func, args, {})
    return func(*args)


def _is_view(getter: Callable) -> bool:
    """Whether an attribute is the entries in another arrangement."""
    return getter.__self__.__name__ in _VIEWS  # type: ignore[attr-defined]


def _set(func: Callable, weight: Tensor, value: Any) -> None:
    attribute = func.__self__.__name__  # type: ignore[attr-defined]
    if attribute == "requires_grad":
        _set_requires_grad(weight, value)
        return
    if attribute != "data":
        func(weight, value)
        return
    selected = selected_of(weight)
    if is_partitioned(weight):
        raise RuntimeError(f"{selected.name} is attached, so DeepSpeed's ZeRO-3 cannot partition it. {ADVICE}")
    if tuple(value.shape) != selected.mask.shape or not value.is_floating_point():
        raise RuntimeError(
            f"{selected.name} is attached to a selection of its {list(selected.mask.shape)} entries, so it cannot "
            f"become {value.dtype} {list(value.shape)}; call gradsel.detach(model) first, and select and attach anew. "
            "To shard the model, use fully_shard() and not FullyShardedDataParallel"
        )
    selected.refresh(weight)
    func(weight, value)
    torch.autograd.graph.increment_version(weight)
    selected.follow(weight)


def _set_requires_grad(weight: Tensor, requires_grad: bool = True) -> Tensor:
    if requires_grad:
        name = selected_of(weight).name
        raise RuntimeError(
            f"{name} is attached: its selected entries are trained through {name}{SUFFIX}, which requires grad in its "
            "place. To train all of it, call gradsel.detach(model)"
        )
    return weight


def _refuse(func: Callable, args: tuple, kwargs: dict) -> Any:
    weights = list(_weights_in((*args, *kwargs.values())))
    if func is torch.autograd.grad:
        asked = kwargs.get("inputs", args[1] if len(args) > 1 else ())
        weights = list(_weights_in((asked,)))
    name = selected_of(weights[0]).name if weights else "the weight"
    what = "autograd.grad" if func is torch.autograd.grad else func.__name__
    raise RuntimeError(
        f"{what} on {name}: it is attached, and no dense gradient of it is formed. The gradient of its selected "
        f"entries is that of {name}{SUFFIX}; for a dense one, call gradsel.detach(model)"
    )


# --- Gradients ---------------------------------------------------------------------------------------------------


#: How many frames up the forward of an autograd function is looked for.
_NEAR = 8


def _require_no_lost_gradient(weight: Tensor) -> None:
    """Refuses autograd functions that are given a weight: they see a frozen tensor and form no gradient for it.

    Their ``apply`` asks no argument for its torch function, but their forward uses the weight sooner or later. It is
    known by its first argument. Functions with a ``setup_context`` have none, and are not found.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_NEAR):
        if frame is None or frame.f_code.co_varnames[:1] == ("ctx",):
            break
        frame = frame.f_back
    given = {} if frame is None else frame.f_locals
    ctx = given.get("ctx")
    if not isinstance(ctx, FunctionCtx) or not ctx.next_functions:  # type: ignore[attr-defined]  # no gradients wanted
        return
    if any(each is weight for each in given.values()) or any(each is weight for each in given.get("args", ())):
        name, kind = selected_of(weight).name, type(ctx).__name__.removesuffix("Backward")
        raise RuntimeError(
            f"{name} is attached and given to the autograd function {kind}, which would form no gradient "
            f"for it: pass weight.view_as(weight), whose gradient reaches {name}{SUFFIX}, or weight.detach() if none "
            "is wanted"
        )


def _read(func: Callable, args: tuple, kwargs: dict) -> Any:
    """A function that reads entries; with gradients on, those of the weights go to their values by the harvest."""
    by = _harvested if functional.forms_gradients() else _present
    return func(*_replaced(args, by), **{key: _replaced(value, by) for key, value in kwargs.items()})


def _replaced(given: Any, by: Callable[[SelectedWeight], Tensor]) -> Any:
    """Arguments with every selected weight replaced."""
    if type(given) is SelectedWeight:
        return by(given)
    if type(given) in (list, tuple):
        replaced = [_replaced(each, by) for each in given]
        return replaced if type(given) is list else tuple(replaced)
    return given


def _harvested(weight: SelectedWeight) -> Tensor:
    """An alias that hands its gradient on to the values."""
    selected = selected_of(weight)
    values = _current(weight, selected)
    if values is None:
        if selected.values() is None:
            raise RuntimeError(
                f"{selected.name} is attached and in use, but the module that held {selected.name}{SUFFIX} is not: "
                "nothing would be trained. Call gradsel.detach(model) before a layer is replaced by another one with "
                "its weight (prepare_qat does so), and attach anew afterwards; weight.detach() reads it without a "
                "gradient"
            )
        return weight
    return functional.harvest(_dense(weight, selected, values), values, selected.mask)


def _present(weight: SelectedWeight) -> Tensor:
    """The weight itself, or a copy with the values that torch.func.functional_call has put in the place of its own."""
    selected = selected_of(weight)
    values = _current(weight, selected)
    return weight if values is None or is_values(values) else _dense(weight, selected, values)


def _current(weight: Tensor, selected: Selected) -> Tensor | None:
    """The values, once they and the weight agree."""
    if not torch.compiler.is_dynamo_compiling():
        return selected.refresh(weight)
    values = selected.values()  # versions cannot be read; hooks keep the weight up to date
    if values is None:
        return None
    if selected.shards is not None:
        return selected.shards.in_forward(values)
    if selected.unseen and is_values(values):
        with torch.no_grad():
            selected.mask.scatter_(weight, values)
    return values


def _dense(weight: SelectedWeight, selected: Selected, values: Tensor) -> Tensor:
    """The dense weight with these values, as a plain tensor."""
    if torch.compiler.is_dynamo_compiling() or is_values(values) or selected.shards is not None:
        return weight.detach()
    made = weight.detach().clone()
    with torch.no_grad():
        selected.mask.scatter_(made, values)
    return made


def _route(weight: Any, route: str, input: Tensor) -> tuple[Any, Tensor, Tensor] | None:
    """What a direct route needs, the values and the dense weight; None if it cannot be taken."""
    if type(weight) is not SelectedWeight or type(input) is SelectedWeight:
        return None
    selected = selected_of(weight)
    needed = selected.direct.get(route)
    if needed is None or input.is_nested or input.layout != torch.strided:
        return None
    values = _current(weight, selected)
    return None if values is None else (needed, values, _dense(weight, selected, values))


def _bias(bias: Any) -> Any:
    return _harvested(bias) if type(bias) is SelectedWeight else bias


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    found = _route(weight, "linear", input)
    if found is None:
        return None
    needed, values, dense = found
    return functional.linear(input, dense, _bias(bias), values, needed)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor | None:
    """transformers' ``Conv1D``: a Linear whose weight is stored as [in, out]."""
    found = _route(mat2, "conv1d", mat1)
    if found is None or beta != 1 or alpha != 1 or out is not None or input.ndim != 1:
        return None
    needed, values, dense = found
    return functional.linear(mat1, dense.t(), _bias(input), values, needed)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    found = _route(weight, "conv", input)
    if found is None:
        return None
    (product, taps), values, dense = found
    if taps.all_channels != weight.shape[1] * groups:
        return None
    dims = len(taps.kernel)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "valid":
        padding = (0,) * dims
    elif padding == "same":
        total = [d * (size - 1) for d, size in zip(dilation, taps.kernel, strict=True)]
        padding = [both // 2 for both in total]
        input = F.pad(input, [odd for both in reversed(total) for odd in (0, both % 2)])
    padding = _each(padding, dims)
    return functional.conv(input, dense, _bias(bias), values, product, taps, stride, padding, dilation, groups)


def _each(number: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (number,) * dims if isinstance(number, int) else tuple(number) * (dims if len(tuple(number)) == 1 else 1)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    found = _route(weight, "embedding", input)
    if found is None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    needed, values, dense = found
    return functional.embedding(input, dense, values, needed, padding_idx)


def _weights_in(given: Sequence[Any]) -> Iterator[Tensor]:
    for each in given:
        if type(each) is SelectedWeight:
            yield each
        elif type(each) in (list, tuple):
            yield from _weights_in(each)


#: Functions with a direct route. Each gives None where it cannot be taken.
_DIRECT: dict[Callable, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
}
