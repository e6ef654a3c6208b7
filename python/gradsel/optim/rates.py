"""Learning rates and betas that stay on the device, for steps in CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def host_number(number: float | Tensor, capturable: bool) -> float:
    """A hyperparameter for the host, or a stand-in for a tensor that :func:`rates_on` hands over."""
    return 0.0 if capturable and isinstance(number, Tensor) else float(number)


def rates_on(group: dict[str, Any], device: torch.device) -> Tensor | None:
    """The ``rates`` of :func:`gradsel_kernels.masked_adam_`; None if the group's are for the host.

    With ``capturable`` they are written on the device, so each replay of a graph reads the tensors of the group again.
    Tensors on the host count with the values that they have at capture, because a graph cannot copy from there.
    """
    numbers = (group["lr"], *group["betas"])
    if not group["capturable"] or not any(isinstance(number, Tensor) for number in numbers):
        return None
    rates = torch.empty(len(numbers), dtype=torch.float64, device=device)
    for i, number in enumerate(numbers):
        if isinstance(number, Tensor) and number.device.type == device.type:
            rates[i].copy_(number.detach().reshape(()))
        else:
            rates[i].fill_(float(number))
    return rates
