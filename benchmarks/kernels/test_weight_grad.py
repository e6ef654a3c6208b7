"""Selected weight gradients: every strategy against the dense product, over the shapes of ViT-B/16 and Llama-3.2-1B."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

#: (tokens, rows, inputs)
SHAPES = [(1576, 3072, 768), (1576, 768, 3072), (512, 8192, 2048), (512, 2048, 8192)]


def dense_bytes(tokens: int, rows: int, n: int) -> int:
    return 4 * (tokens * rows + tokens * n + rows * n)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_random_masks(contest, shape):
    """Random entries read from every input, so the input is used whole."""
    tokens, rows, n = shape
    torch.manual_seed(0)
    grad_output, input = torch.randn(tokens, rows), torch.randn(tokens, n)
    contenders = {
        0: {
            "dense product alone": (lambda: grad_output.t() @ input, dense_bytes(tokens, rows, n)),
            "grad_output.sum(0)": (lambda: grad_output.sum(0), 4 * tokens * rows),
        }
    }
    for k in (1, 10, 64, n // 4, n // 2):
        cols = torch.rand(rows, n).topk(k).indices.sort(1).values.to(torch.int32)
        moved = 4 * (tokens * rows + tokens * n + 2 * rows * k)

        def ours(strategy: str, cols: torch.Tensor = cols) -> torch.Tensor:
            return gk.selected_weight_grad(grad_output, input, cols, strategy)

        contenders[k] = {
            f"native, {strategy}": (lambda ours=ours, strategy=strategy: ours(strategy), moved)
            for strategy in ("gather", "union", "tile")
        }
        contenders[k]["native"] = (lambda ours=ours: ours("auto"), moved)
    contest("selected_weight_grad", f"{tokens} tokens, {rows}x{n}", "float32", contenders)


def test_clustered_masks(contest):
    """All rows read from 48 inputs, which forward has copied out."""
    tokens, rows, n, used = 1576, 3072, 768, 48
    torch.manual_seed(0)
    grad_output, input = torch.randn(tokens, rows), torch.randn(tokens, n)
    columns = torch.randperm(n)[:used].sort().values.to(torch.int32)
    kept = gk.take_columns(input, columns).mT
    contenders = {
        0: {
            "dense product alone": (lambda: grad_output.t() @ input, dense_bytes(tokens, rows, n)),
            "product with the used inputs alone": (
                lambda: grad_output.t() @ kept,
                4 * (tokens * rows + tokens * used + rows * used),
            ),
            "take_columns": (lambda: gk.take_columns(input, columns), 8 * tokens * used),
        }
    }
    for k in (1, 10):
        cols = torch.rand(rows, used).topk(k).indices.sort(1).values.to(torch.int32)
        moved = 4 * (tokens * rows + tokens * used + 2 * rows * k)
        contenders[k] = {
            "native, and the bias": (
                lambda cols=cols: gk.selected_weight_grad_bias(grad_output, kept, cols),
                moved,
            ),
            "native": (lambda cols=cols: gk.selected_weight_grad(grad_output, kept, cols), moved),
        }
    contest("selected_weight_grad, 48 inputs used", f"{tokens} tokens, {rows}x{n}", "float32", contenders)
