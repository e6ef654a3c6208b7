"""Runs every operation once or twice on small, odd shapes, for ``compute-sanitizer`` (see harness/checks.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout, backends

#: One row, one column, a word of bits and one more, rows that are streamed, and rows that start at odd addresses.
SHAPES = [(1, 1), (5, 33), (37, 255), (3, 9001)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choices(dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        grad = torch.randn(rows, cols + 1, device=DEVICE).to(dtype)[:, 1:]
        for view in (grad, grad.T.contiguous().T):
            for k in {1, 5, min(cols, 20)}:
                gk.topk_rows(view, k)
                gk.topk_rows_bits(view, k)


def packing() -> None:
    for rows, cols in SHAPES:
        bits = gk.pack_bits(chosen(columns(rows, cols, 3), cols))
        gk.unpack_bits(bits, cols)


def copying(dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols, device=DEVICE).to(dtype)
        index = columns(rows, cols, 3)
        gk.scatter_rows_(weight, index, -gk.gather_rows(weight, index))
        gk.take_columns(weight, index[0])


def products(dtype: torch.dtype) -> None:
    for tokens, rows, cols, k in ((1, 1, 1, 1), (33, 65, 130, 3), (70, 7, 40, 11)):
        grad_output, x = (torch.randn(tokens, size, device=DEVICE).to(dtype) for size in (rows, cols))
        index = columns(rows, cols, k)
        gk.selected_addmm_(grad_output.clone(), x, index, torch.randn(rows, k, device=DEVICE))
        for strategy in ("gather", "tile", "union"):
            gk.selected_weight_grad(grad_output, x, index, strategy)
            gk.selected_weight_grad_bias(grad_output, x.T.contiguous().T, index, strategy)


def steps(dtype: torch.dtype) -> None:
    """Every layout with a dense gradient, and values with a compact one; several tensors in one call."""
    for rows, cols in SHAPES:
        index = columns(rows, cols, 3)
        flat = (torch.arange(rows, device=DEVICE)[:, None] * cols + index).flatten()
        kinds: list[tuple[Layout, Tensor | None, tuple[int, ...]]] = [
            (Layout.ALL, None, (rows, cols)),
            (Layout.COLS, index, tuple(index.shape)),
            (Layout.FLAT, flat.to(torch.int32), (index.numel(),)),
            (Layout.FLAT, flat, (index.numel(),)),
        ]
        weights = [torch.randn(rows, cols, device=DEVICE).to(dtype) for _ in range(len(kinds) + 1)]
        shapes = [shape for *_, shape in kinds] + [tuple(index.shape)]
        compact = torch.randn(index.shape, device=DEVICE)
        for amsgrad in (False, True):
            moments = [[torch.zeros(shape, device=DEVICE) for shape in shapes] for _ in range(2 + amsgrad)]
            gk.masked_adam_(
                weights, [*(torch.randn_like(weight) for weight in weights[:-1]), compact.clone()], *moments[:2],
                [torch.zeros((), device=DEVICE) for _ in weights], lr=0.1, weight_decay=0.01,
                indices=[*(index for _, index, _ in kinds), index],
                layouts=[*(layout for layout, *_ in kinds), Layout.COLS],
                values=[*(None for _ in kinds), compact], max_exp_avg_sqs=moments[2] if amsgrad else None,
            )  # fmt: skip


def first_steps(dtype: torch.dtype) -> None:
    """Every size of K, all shapes in one call; with masks, maxima and originals, and what 16 bits lose."""
    for low_precision in ("master", "kahan"):
        grads = [torch.randn(rows, cols + 1, device=DEVICE).to(dtype)[:, 1:] for rows, cols in SHAPES]
        for view in (grads, [grad.T.contiguous().T for grad in grads]):
            for k in (1, 5, 70):
                weights = [torch.randn(grad.shape, device=DEVICE).to(dtype) for grad in grads]
                gk.topk_masked_adam_(weights, view, k, lr=0.1, amsgrad=True, anchor=0.1, low_precision=low_precision)


def columns(rows: int, cols: int, k: int) -> Tensor:
    scores = torch.rand(rows, cols, device=DEVICE)
    return scores.topk(min(k, cols)).indices.sort(1).values.to(torch.int32)


def chosen(index: Tensor, cols: int) -> Tensor:
    """The mask of columns of every row."""
    return torch.zeros(index.shape[0], cols, dtype=torch.bool, device=DEVICE).scatter_(1, index.long(), True)


#: Names, and whether they take a dtype.
OPERATIONS: list[tuple[str, Callable[..., None], bool]] = [
    ("topk", choices, True),
    ("bits", packing, False),
    ("rows", copying, True),
    ("weight_grad", products, True),
    ("adam", steps, True),
    ("first_step", first_steps, True),
]


def main() -> int:
    """0 if every operation that a backend has ran to its end."""
    failures = 0
    for name in ("triton", "cuda") if DEVICE.type == "cuda" else ("native",):
        try:
            reason = backends.backend(name).why_off(DEVICE) if name in backends.NAMES else "there is no such backend"
        except ImportError as error:
            reason = str(error)
        if reason:
            print(f"ran nothing on {name}: off: {reason}", flush=True)
            continue
        ran = []
        with gk.use_backend(name):
            for operation, run, typed in OPERATIONS:
                try:
                    for dtype in (torch.float32, torch.bfloat16) if typed else (None,):
                        run(*([dtype] if typed else []))
                    if DEVICE.type == "cuda":
                        torch.cuda.synchronize()
                    ran.append(operation)
                except Exception as error:
                    failures += 1
                    print(f"failed on {name}: {operation}: {type(error).__name__}: {error}", flush=True)
        print(f"ran {', '.join(ran) or 'nothing'} on {name}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
