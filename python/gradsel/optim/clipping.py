"""Clipping the gradients of what MaskedAdam trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gradsel.optim.call import Target
from gradsel.sharding import whole_of


def clip(targets: Iterable[Target], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """See :meth:`gradsel.MaskedAdam.clip_grad_norm_`."""
    found = [(target, grad) for target in targets if (grad := target.parameter.grad) is not None and target.mask.nnz]
    grads = [grad if target.is_compact or target.mask.is_whole else target.mask.gather(grad) for target, grad in found]
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}  # gradients, and parameters, by mesh and placements
    for (target, _), grad in zip(found, grads, strict=True):
        of_kind = alike.setdefault((getattr(grad, "device_mesh", None), getattr(grad, "placements", None)), ([], []))
        of_kind[0].append(grad)
        of_kind[1].append(target.parameter)
    if len({mesh for mesh, _ in alike}) == 1:
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    else:  # tensor parallelism shards some of them; torch adds up norms on one mesh only
        norms = [whole_of(get_total_norm(part, norm_type)) for part, _ in alike.values()]
        norm = get_total_norm(norms, norm_type, error_if_nonfinite)
    for _, parameters in alike.values():
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
