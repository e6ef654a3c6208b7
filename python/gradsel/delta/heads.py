"""Heads of other sizes in one model: a task brings its own, which takes the place of the model's for the time being."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradsel.delta.parts import Part, tensors_of
from gradsel.delta.sites import Site
from gradsel.tables import shape_text

#: Attributes in which layers say what the first dimension of their parameters is.
_SIZES = ("out_features", "out_channels", "num_embeddings")


class Head(Site):
    """A parameter whose first dimension, the number of classes, is another one in the task.

    The parameter stays the same object; its memory is exchanged for the task's and back.
    """

    def __init__(self, name: str, part: Part, tensor: Tensor, values: Tensor, modules: Sequence[nn.Module]) -> None:
        super().__init__(name, part, tensor, values)
        self.modules = modules
        self._base, self._own = tensor.data, values.view(part.mask.shape)

    def put(self) -> None:
        """Makes the parameter the task's."""
        self._exchange(self._own)

    def take_off(self) -> None:
        """Makes the parameter that of the base again."""
        self._exchange(self._base)

    def has_moved(self) -> bool:
        memories = [(data.data_ptr(), data.dtype, data.stride()) for data in (self._base, self._own)]
        return (self.tensor.data_ptr(), self.tensor.dtype, self.tensor.stride()) not in memories

    def _exchange(self, data: Tensor) -> None:
        old, new = self.tensor.shape[0], data.shape[0]
        self.tensor.data = data
        torch.autograd.graph.increment_version(self.tensor)
        for module in self.modules:
            for attribute in _SIZES:
                if vars(module).get(attribute) == old:
                    setattr(module, attribute, new)


def heads_in(parts: Mapping[str, Part], model: nn.Module) -> dict[str, Head]:
    """The heads that a task has in another size than the model, by name.

    Raises:
        ValueError: it has only some parameters of a layer in that size.
    """
    tensors = tensors_of(model)
    found: dict[str, Head] = {}
    for name, part in parts.items():
        tensor, shape = tensors.get(name), part.mask.shape
        if not part.mask.is_whole or not isinstance(tensor, nn.Parameter) or not shape or not tensor.ndim:
            continue
        if tuple(tensor.shape) == shape or tuple(tensor.shape[1:]) != shape[1:]:
            continue
        modules = [module for module in model.modules() if any(p is tensor for p in module._parameters.values())]
        values = part.values.reshape(-1).to(tensor.device, tensor.dtype)
        found[name] = Head(name, part, tensor, values, modules)
    sizes = {id(head.tensor): head.part.mask.shape[0] for head in found.values()}
    for name, head in found.items():
        old, new = head.tensor.shape[0], head.part.mask.shape[0]
        for module in head.modules:
            for short, other in module._parameters.items():
                if other is not None and other.ndim and other.shape[0] == old and sizes.get(id(other)) != new:
                    raise ValueError(
                        f"{name} is for {new} classes in the delta, for {old} in the model, but the delta does not "
                        f"have {short} of that layer, {shape_text(other.shape)}, for {new} as well"
                    )
    return found
