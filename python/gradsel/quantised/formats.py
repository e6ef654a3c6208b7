"""The weight of a quantised Linear layer as this library sees it: a matrix that can be made dense when it is needed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsel.dtypes import integer_sum
from gradsel.tables import shape_text


class Quantised(ABC):
    """The quantised weight [out, in] of a layer that computes ``input @ weight.T + bias``.

    It is looked up in the layer again for each use, because libraries replace what they store when a model is moved.

    Attributes:
        library: what stores it, for messages.
        kind: the name of the format, such as ``nf4``.
        shape: of the dense weight.
        dtype: in which the library makes it dense by default.
        returns_input_dtype: the layer returns the dtype of its input, whichever it multiplies in.
        own_state: the layer saves and loads its own tensors only, and no parameter that is put beside them.
    """

    library: str
    returns_input_dtype: ClassVar[bool] = False
    own_state: bool = False
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def device(self) -> torch.device:
        found: torch.device = self.module.weight.device
        return found

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight, a new contiguous tensor [out, in]."""

    def multiply(self, input: Tensor) -> Tensor | None:
        """``input @ weight.T`` as the library computes it for inference, if it can do so without a dense weight.

        Args:
            input: [tokens, in], in what :meth:`compute_dtype` returns.

        Returns:
            [tokens, out] in the same dtype; None where the library always makes the weight dense.
        """
        return None

    @abstractmethod
    def stored(self) -> list[Tensor]:
        """The tensors that the weight is stored in: codes first, then scales."""

    def requantised(self, dense: Tensor) -> nn.Parameter:
        """A parameter for the layer that stores another dense weight with the same settings.

        Raises:
            ValueError: the library cannot do that.
        """
        raise ValueError(
            f"{self.library}'s {self.kind} cannot be quantised anew, because its layers do not keep all settings that "
            "they were made with: merge to a dtype, as in merge(model, torch.bfloat16), and quantise that"
        )

    def like(self, parameter: nn.Parameter) -> Quantised:
        """The weight that :meth:`requantised` has stored in a parameter, which the layer does not have."""
        raise NotImplementedError

    def put(self, parameter: nn.Parameter) -> None:
        """Gives the layer a parameter that :meth:`requantised` has made."""
        self.module.weight = parameter

    def compute_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype in which the layer multiplies this input."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return input.dtype

    def fingerprint(self) -> str:
        """Shape, format and a hash of all codes and scales, such as ``2048x8192 nf4 5f0c8e1d9ab37264``.

        It does not depend on the device, nor on the dtype in which the weight is made dense.
        """
        content = hashlib.blake2b(digest_size=8)
        for tensor in self.stored():
            # Like those of dense weights: a sum over all bits and single entries, because hashing every byte is slow.
            bytes_of = tensor.detach().contiguous().view(-1).view(torch.uint8)
            places = torch.arange(min(bytes_of.numel(), 4096), device=bytes_of.device)
            sample = bytes_of[places * bytes_of.numel() // max(len(places), 1)]
            content.update(sample.cpu().numpy().tobytes())
            content.update(str(integer_sum(bytes_of)).encode())
        return f"{shape_text(self.shape)} {self.kind} {content.hexdigest()}"


class StandIn(nn.Parameter):
    """A float32 parameter in the shape of a quantised weight that takes no memory: gradients of a selection go there.

    Attributes:
        quantised: the weight that it stands for.
    """

    quantised: Quantised

    def __new__(cls, quantised: Quantised) -> StandIn:
        nothing = torch.zeros((), device=quantised.device).expand(quantised.shape)
        made: StandIn = torch.Tensor._make_subclass(cls, nothing, False)
        made.quantised = quantised
        return made
