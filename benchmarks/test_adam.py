"""One optimizer step on ViT-B/16's weight matrices: ours on a per-row mask, against dense Adam.

Every provider trains its own copy of the 86 M weights, so none finds another's data in a cache.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import PerRow

LINE = 64  # bytes that the memory moves for one scattered access on a CPU
SHAPES = [(768, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]


def vit(width: int = 1) -> list[tuple[str, nn.Parameter]]:
    """ViT-B/16's matrices, patch embedding included; ``width`` multiplies their columns."""
    named = []
    for i, (rows, cols) in enumerate(SHAPES):
        parameter = nn.Parameter(torch.randn(rows, cols * width))
        parameter.grad = torch.randn_like(parameter)
        named.append((f"matrix{i}", parameter))
    return named


def random_selection(named, k: int) -> gradsel.Selection:
    return gradsel.Selection(
        {name: PerRow(gk.topk_rows(torch.randn(p.shape), k), p.shape) for name, p in named}, {"policy": f"random {k}"}
    )


def masked(k: int, width: int = 1):
    named = vit(width)
    selection = random_selection(named, k)
    return gradsel.MaskedAdam(named.copy(), masks=selection), selection.trainable_count()


def attached(k: int) -> tuple[nn.Module, gradsel.MaskedAdam]:
    """An attached model and its optimizer, which writes the values to the weights for as long as the model lives."""
    model = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in SHAPES)
    gradsel.attach(model, random_selection(list(model.named_parameters()), k))
    parameters = gradsel.trainable_parameters(model)
    for values in parameters:
        values.grad = torch.randn_like(values)
    return model, gradsel.MaskedAdam(parameters)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_step(compare, k):
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in SHAPES)
    dense = torch.optim.Adam([p for _, p in vit()], fused=True)

    published_named = vit()
    published = torch.optim.Adam([p for _, p in published_named], fused=True)
    dense_masks = [mask.to_dense().float() for mask in random_selection(published_named, k).values()]

    def mask_then_step():
        for (_, parameter), mask in zip(published_named, dense_masks, strict=True):
            parameter.grad.mul_(mask)
        published.step()

    ours, nnz = masked(k)
    bound_named = vit()
    bound_cols = [mask.cols for mask in random_selection(bound_named, k).values()]

    def gather_only():
        """For scale: reading every selected weight and gradient once, and nothing else, by two calls a matrix."""
        for (_, parameter), cols in zip(bound_named, bound_cols, strict=True):
            gk.gather_rows(parameter.detach(), cols)
            gk.gather_rows(parameter.grad, cols)

    compact_values = [nn.Parameter(torch.randn(rows, k)) for rows, _ in SHAPES]
    for values in compact_values:
        values.grad = torch.randn_like(values)
    compact = gradsel.MaskedAdam(compact_values)
    model, of_model = attached(k)
    weight = next(model.parameters())
    before = weight.clone()
    of_model.step()
    assert not torch.equal(weight, before)
    per_entry = 4 * 4 + 4 + LINE + 2 * LINE  # moments read and written, index, gradient read, weight read and written
    compare(
        "masked_adam_",
        "ViT-B/16, 86 M",
        "float32",
        k,
        {
            "torch Adam(fused), dense": (dense.step, 28 * weights),
            "dense mask, then torch Adam(fused)": (mask_then_step, (28 + 12) * weights),
            "gather_rows of weights and gradients": (gather_only, (4 + 4 + 2 * LINE) * nnz),
            "native, compact gradient and values": (compact.step, 28 * nnz),
            "native, attached": (of_model.step, (28 + 2 * LINE) * nnz),
            "native": (ours.step, per_entry * nnz),
        },
    )


@pytest.mark.parametrize("k", [1, 10])
def test_cost_does_not_depend_on_the_size_of_the_model(compare, k):
    """Twice the columns at the same number of selected entries."""
    torch.manual_seed(0)
    twice, nnz = masked(k, width=2)
    once, same = masked(k)
    assert nnz == same
    flush = torch.zeros(2**25)
    per_entry = 4 * 4 + 4 + 3 * LINE
    compare(
        "masked_adam_, twice the model",
        "ViT-B/16, 86 M",
        "float32",
        k,
        {
            "native, 172 M weights": (twice.step, per_entry * nnz),
            "memory written in between": (lambda: flush.add_(1), 2 * flush.nbytes),
            "native": (once.step, per_entry * nnz),
        },
    )
