"""Clipping the gradients of what MaskedAdam trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gradsel.optim.call import Target
from gradsel.sharding import whole_of


def clip(targets: Iterable[Target], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """See :meth:`gradsel.MaskedAdam.clip_grad_norm_`."""
    found = [(target, grad) for target in targets if (grad := target.parameter.grad) is not None and target.mask.nnz]
    grads = [grad if target.is_compact or target.mask.is_whole else target.mask.gather(grad) for target, grad in found]
    kinds = [(getattr(grad, "device_mesh", None), getattr(grad, "placements", None)) for grad in grads]
    apart = list(dict.fromkeys(kinds))
    if len({mesh for mesh, _ in apart}) == 1:
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    else:  # tensor parallelism shards some of them; torch adds up norms on one mesh only
        parts = [[grad for grad, own in zip(grads, kinds, strict=True) if own == kind] for kind in apart]
        norms = [whole_of(get_total_norm(part, norm_type)) for part in parts]
        norm = get_total_norm(norms, norm_type, error_if_nonfinite)
    for kind in apart:
        there = [target.parameter for (target, _), own in zip(found, kinds, strict=True) if own == kind]
        clip_grads_with_norm_(there, max_norm, norm)
    return norm
