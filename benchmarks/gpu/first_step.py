"""The part "first_step": selecting and updating in one call, against the calls that it fuses and top-K alone.

The target is 1.1 of the time of top-K alone: all that a first step does beyond it happens at the selected entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

import gradsel_kernels as gk
from benchmarks.gpu.adam import LLAMA, SECTOR
from benchmarks.harness.bench import Bench, Provider
from benchmarks.harness.results import Row, failed
from benchmarks.harness.tables import errors, number, over_k
from benchmarks.harness.timing import Call
from gradsel_kernels import Layout

OPERATION, TARGET = "topk_masked_adam_", 1.1
#: Matrices of a model; the second one's are a quarter of its blocks, to fit beside their gradients.
MODELS = {
    "ViT-B/16": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "Llama-3.2-1B, 4 blocks": LLAMA * 4,
}
SMALL = {"toy": [(37, 100), (5, 300)]}
KS = (1, 8, 64)
ALONE, APART = ", top-K of each", ", the three calls"
LR = 1e-5


def separate(weights: Sequence[Tensor], grads: Sequence[Tensor], k: int) -> list[Tensor]:
    """The same by topk_rows_bits, new moments, and masked_adam_; returns the columns."""
    cols = [gk.topk_rows_bits(grad, k)[0] for grad in grads]
    moments = [[torch.zeros(index.shape, device=index.device) for index in cols] for _ in range(2)]
    steps = [torch.zeros((), device=index.device) for index in cols]
    layouts = [Layout.COLS] * len(cols)
    gk.masked_adam_(weights, grads, *moments, steps, lr=LR, indices=cols, layouts=layouts)
    return cols


@cache
def wrong(backend: str, device: torch.device, dtype: torch.dtype, k: int) -> str | None:
    """What differs between one call and three on two small matrices; each way to run is checked once."""
    with gk.use_backend(backend):
        grads = [torch.randn(shape, device=device).to(dtype) for shape in ((37, 768), (9, 5000))]
        weights = [grad.cos() for grad in grads]
        expected = [weight.clone() for weight in weights]
        cols = separate(expected, grads, k)
        found = gk.topk_masked_adam_(weights, grads, k, lr=LR).cols
    same = all(map(torch.equal, (*weights, *found), (*expected, *cols)))
    return None if same else f"another result than that of the three calls, {dtype}, K = {k}"


def measure(bench: Bench) -> None:
    torch.manual_seed(0)
    for model, shapes in (SMALL if bench.small else MODELS).items():
        for dtype in (torch.float32, torch.bfloat16):
            if device_bytes(shapes, dtype) > 0.8 * memory(bench.device):
                continue
            grads = [torch.randn(shape, device=bench.device).to(dtype) for shape in shapes]
            weights = [torch.randn(shape, device=bench.device).to(dtype) for shape in shapes]
            name = str(dtype).removeprefix("torch.")
            for k in KS:
                made = providers(bench, weights, grads, k)
                baseline = f"{bench.backends[0]}{APART}"
                bench.compare(OPERATION, model, name, k, made, baseline, expected=6.0)
            del grads, weights, made
            bench.release()


def device_bytes(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    return sum(2 * rows * cols * dtype.itemsize for rows, cols in shapes)


def memory(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def providers(bench: Bench, weights: list[Tensor], grads: list[Tensor], k: int) -> dict[str, Provider]:
    read = sum(grad.nbytes for grad in grads)
    entries = sum(grad.shape[0] * min(k, grad.shape[1]) for grad in grads)
    words = sum(4 * grad.shape[0] * ((grad.shape[1] + 31) // 32) for grad in grads)
    # Of each entry: its column and two moments are written, and the sector of the weight is read and written.
    updated = entries * (12 + 2 * SECTOR)

    def call(name: str, run: Callable[[], object], nbytes: int) -> Call:
        backend = bench.backend(name)
        if difference := wrong(backend, bench.device, grads[0].dtype, k):
            raise AssertionError(difference)
        return Call([run], nbytes, backend, graph=False, cold=True, wall=True)

    def one() -> object:
        return gk.topk_masked_adam_(weights, grads, k, lr=LR)

    def three() -> object:
        return separate(weights, grads, k)

    def alone() -> object:
        return [gk.topk_rows_bits(grad, k) for grad in grads]

    made: dict[str, Provider] = {}
    for name in bench.backends:
        made[name + APART] = lambda n=name: call(n, three, read + words + updated)
        made[name + ALONE] = lambda n=name: call(n, alone, read + words + 4 * entries)
        made[name] = lambda n=name: call(n, one, read + words + updated)
    return made


def table(rows: Sequence[Row]) -> list[str]:
    """Device and host time over K, and whether one call takes no longer than the target."""
    lines = ["device ms / host ms (fraction of a copy's rate)"]
    names = dict.fromkeys((row["size"], row["dtype"]) for row in rows)
    for size, dtype in names:
        lines += over_k(
            [row for row in rows if (row["size"], row["dtype"]) == (size, dtype)],
            lambda row: row["provider"],
            lambda row: f"{number(row['p50_ms'])}/{number(row['wall_p50_ms'])} ({number(row['fraction_of_copy'], 2)})",
            f"{size} {dtype}",
        )
    found = [row for row in rows if not failed(row)]
    times = {(row["size"], row["dtype"], row["k"], row["provider"]): float(row["p50_ms"]) for row in found}
    for name in sorted({row["provider"] for row in found if "," not in row["provider"]}):
        ratios = sorted(
            ms / times[size, dtype, k, name + ALONE]
            for (size, dtype, k, provider), ms in times.items()
            if provider == name and (size, dtype, k, name + ALONE) in times
        )
        if ratios:
            reached = sum(ratio <= TARGET for ratio in ratios)
            lines.append(
                f"{name}: target {TARGET} of top-K alone reached in {reached} of {len(ratios)}; most {ratios[-1]:.2f}"
            )
    return [*lines, *errors(rows)]
