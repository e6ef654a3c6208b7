"""SHiRA and Super-Tuning layers of PEFT, which keep their files and their life cycle but not a dense gradient.

PEFT composes a whole weight in every forward pass, and autograd forms a whole gradient of it, of which the adapter's
entries are taken (``Linear.forward`` in peft/tuners/shira/layer.py and peft/tuners/supertuning/layer.py). Here, the
layers get a subclass with another ``forward`` for this case; whatever else PEFT does with them is PEFT's own code.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from peft.tuners.shira import layer as shira
from peft.tuners.supertuning import layer as supertuning
from torch import Tensor, nn

from gradsel.masks.weight_grad import Product
from gradsel.parameters.trainable import why_untrainable
from gradsel.peft.composed import linear

Model = TypeVar("Model", bound=nn.Module)


def accelerate(peft_model: Model) -> Model:
    """Gives the SHiRA and Super-Tuning layers of a PEFT model our forward and backward, in place.

    Their results are PEFT's, up to the order of sums. State dicts, files, configs, merging, switching and further
    adapters stay as they are, and so do the parameters that an optimizer has. Call it again after layers were added.
    While a layer computes, its base weight has the adapter's values in it, so other threads must not use the model
    then. Where PEFT's own forward is needed (torch.compile, quantised or sharded bases), it runs.

    Args:
        peft_model: the result of ``get_peft_model`` or ``PeftModel.from_pretrained``, or any model with such layers.

    Returns:
        The same model.

    Raises:
        ValueError: it has no SHiRA or Super-Tuning layers.
    """
    count = 0
    for module in peft_model.modules():
        for kind, faster in _FASTER.items():
            if type(module) is kind:
                module.__class__ = faster
            count += isinstance(module, faster)
    if not count:
        raise ValueError(
            f"{type(peft_model).__name__} has no SHiRA or Super-Tuning layers, the adapters of PEFT that train entries "
            "of a weight; for other models, gradsel.attach() does the same"
        )
    return peft_model


class _Faster:
    """What both kinds of layers need: places and products of their adapters, computed once."""

    def _own_forward(self) -> tuple[nn.Linear, list[str]] | None:
        """The base layer and the active adapters, if our forward can be used."""
        layer = cast(Any, self)
        if layer.disable_adapters or layer.merged or torch.compiler.is_compiling():
            return None
        base, names = layer.get_base_layer(), [name for name in layer.active_adapters if name in self._values()]
        if type(base) is not nn.Linear or not names or base.weight.requires_grad or not base.weight.is_contiguous():
            return None
        if (
            type(base.weight) is not nn.Parameter
            or base.weight.is_meta
            or base.weight.is_inference()
            or why_untrainable(base.weight) is not None
        ):
            return None
        return base, names

    def _values(self) -> Any:
        raise NotImplementedError

    def _indices(self, name: str) -> Tensor:
        """Row-major indices of an adapter's values."""
        raise NotImplementedError

    def _source(self, name: str) -> Tensor:
        """The tensor of PEFT that the indices are made from."""
        raise NotImplementedError

    def _known(self, name: str, weight: Tensor) -> tuple[Tensor, Product]:
        """Places and product of an adapter."""
        known: dict[str, Any] = vars(self).setdefault("_gradsel_products", {})
        source = self._source(name)
        key = (id(source), source._version, tuple(weight.shape), weight.device)
        if name not in known or known[name][0] != key:
            places = self._indices(name).to(weight.device)
            rows, inputs = weight.shape
            product = Product.irregular(places // inputs, places % inputs, rows, inputs)
            known[name] = key, source, places, product  # the source is kept alive, so that its id stays its own
        return known[name][2:]

    def _composed(self, x: Tensor, base: nn.Linear, names: list[str], values: list[Tensor]) -> Tensor:
        """The base layer with the values of these adapters in its weight."""
        places, products = zip(*(self._known(name, base.weight) for name in names), strict=True)
        return linear(x, base.weight, base.bias, values, places, products)


class ShiraLinear(_Faster, shira.Linear):
    """PEFT's SHiRA layer with our forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = self._own_forward()
        if found is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, names = found
        shira._warn_once_about_module_hooks(self)
        return self._composed(x, base, names, [self.shira_weight[name] * self.scaling[name] for name in names])

    def _values(self) -> Any:
        return self.shira_weight

    def _source(self, name: str) -> Tensor:
        return self.shira_indices[name]

    def _indices(self, name: str) -> Tensor:
        indices = self.shira_indices[name].long()
        return indices[0] * self.in_features + indices[1]


class SupertuningLinear(_Faster, supertuning.Linear):
    """PEFT's Super-Tuning layer with our forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = self._own_forward()
        if found is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, names = found
        supertuning._warn_once_about_module_hooks(self)
        result = self._composed(x, base, names, [self.supertuning_values[name] for name in names])
        for name in names:
            if self.supertuning_rank[name] > 0:  # its LoRA, as PEFT computes it
                down, up = self.supertuning_lora_A[name], self.supertuning_lora_B[name]
                scale = self.supertuning_lora_alpha[name] / self.supertuning_rank[name]
                dropped = self.supertuning_lora_dropout[name](x).to(down.weight.dtype)
                result = result + (scale * up(down(dropped))).to(result.dtype)
        return result

    def _values(self) -> Any:
        return self.supertuning_values

    def _source(self, name: str) -> Tensor:
        return self.supertuning_indices[name]

    def _indices(self, name: str) -> Tensor:
        return self.supertuning_indices[name].long()


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    shira.Linear: ShiraLinear,
    supertuning.Linear: SupertuningLinear,
}
