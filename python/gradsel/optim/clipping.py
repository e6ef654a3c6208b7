"""Clipping the gradients of what MaskedAdam trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gradsel.optim.call import Target


def clip(targets: Iterable[Target], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """See :meth:`gradsel.MaskedAdam.clip_grad_norm_`."""
    found = [(target, grad) for target in targets if (grad := target.parameter.grad) is not None and target.mask.nnz]
    grads = [grad if target.is_compact or target.mask.is_whole else target.mask.gather(grad) for target, grad in found]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    clip_grads_with_norm_([target.parameter for target, _ in found], max_norm, norm)
    return norm
