"""The part "topk": rows of a gradient, from one ViT layer to an embedding, against torch.topk and a plain reduction.

The target for small K is 0.8 of a copy's rate, because every entry has to be read once. ``amax`` shows what torch's own
reduction over the same rows reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch

import gradsel_kernels as gk
from benchmarks.harness.bench import Bench, Provider
from benchmarks.harness.results import Row, failed
from benchmarks.harness.tables import errors, number, over_k
from benchmarks.harness.timing import Call
from gradsel_kernels import reference

#: The important ones first: ViT-B/16 and Llama, then sizes between and beyond them.
SIZES = [
    (3072, 768), (12288, 4096), (768, 3072), (12288, 16384), (50000, 768), (50000, 4096), (768, 768), (50000, 16384),
]  # fmt: skip
SMALL = [(37, 100), (64, 65)]
KS = (1, 2, 4, 8, 16, 64)
#: A first pass, so that all kinds are measured even if time runs out.
FIRST, FIRST_KS = 4, (1, 8, 64)
DTYPES = (torch.float32, torch.bfloat16)
TARGET, TARGET_K = 0.8, 8
BASELINE, READING = "torch.topk of abs", "amax"
BITS = ", with bits"


def operator(grad: torch.Tensor, k: int, bits: bool) -> tuple[torch.Tensor, ...]:
    return gk.topk_rows_bits(grad, k) if bits else (gk.topk_rows(grad, k),)


@cache
def wrong(backend: str, device: torch.device, dtype: torch.dtype, k: int, bits: bool) -> str | None:
    """What differs from the specification on two small matrices with ties; each way to run is checked once."""
    for shape in ((37, 1000), (5, 20000)):
        grad = (torch.randn(shape) * 4).round().div(4).to(dtype)
        expected = reference.topk_rows_bits(grad, k) if bits else (reference.topk_rows(grad, k),)
        with gk.use_backend(backend):
            found = operator(grad.to(device), k, bits)
        if not all(torch.equal(mine.cpu(), other) for mine, other in zip(found, expected, strict=True)):
            return f"another choice than the reference's, {shape}, {dtype}, K = {k}"
    return None


def providers(bench: Bench, rows: int, cols: int, dtype: torch.dtype, k: int, inputs) -> dict[str, Provider]:
    nbytes = rows * cols * dtype.itemsize

    def torchs() -> Call:
        return Call([lambda g=g: g.abs().topk(k, 1, sorted=False) for g in inputs()], nbytes)

    def reading() -> Call:
        return Call([lambda g=g: g.amax(1) for g in inputs()], nbytes)

    def ours(name: str, bits: bool) -> Call:
        backend = bench.backend(name)
        if difference := wrong(backend, bench.device, dtype, k, bits):
            raise AssertionError(difference)
        written = rows * k * 4 + (rows * ((cols + 31) // 32) * 4 if bits else 0)
        return Call([lambda g=g: operator(g, k, bits) for g in inputs()], nbytes + written, backend)

    made: dict[str, Provider] = {BASELINE: torchs, READING: reading}
    for name in bench.backends:
        made[name] = lambda name=name: ours(name, False)
        made[name + BITS] = lambda name=name: ours(name, True)
    return made


def measure(bench: Bench) -> None:
    torch.manual_seed(0)
    if bench.small:
        measure_sizes(bench, SMALL, KS[::3])
        return
    measure_sizes(bench, SIZES[:FIRST], FIRST_KS)
    measure_sizes(bench, SIZES, KS)  # skips what has been measured by then


def measure_sizes(bench: Bench, sizes: Sequence[tuple[int, int]], ks: Sequence[int]) -> None:
    for rows, cols in sizes:
        for dtype in DTYPES:
            nbytes = rows * cols * dtype.itemsize

            @lru_cache(maxsize=1)
            def inputs(rows=rows, cols=cols, dtype=dtype, nbytes=nbytes) -> list[torch.Tensor]:
                copies = bench.clock.sets(nbytes)
                return [torch.randn(rows, cols, device=bench.device, dtype=dtype) for _ in range(copies)]

            for k in ks:
                name = str(dtype).removeprefix("torch.")
                made = providers(bench, rows, cols, dtype, k, inputs)
                bench.compare("topk_rows", f"{rows}x{cols}", name, k, made, BASELINE, expected=4.0)
            inputs.cache_clear()
            bench.release()


def table(rows: Sequence[Row]) -> list[str]:
    """Fraction of the copy's rate, speedup over torch.topk, whether the target is reached, and what the bits cost."""
    names = sorted({row["provider"] for row in rows})
    ours = [name for name in names if name not in (BASELINE, READING) and not name.endswith(BITS)]
    lines = ["fraction of a copy's rate / speedup over torch.topk"]
    lines += over_k(
        [row for row in rows if row["provider"] in ours],
        lambda row: f"{row['size']} {row['dtype']} {row['provider']}",
        lambda row: f"{number(row['fraction_of_copy'], 2)} / {number(row['speedup'], 2)}x",
        "",
    )
    for name in ours:
        found = [row for row in rows if row["provider"] == name and not failed(row)]
        counted = [row for row in found if int(row["k"]) <= TARGET_K]
        below = [row for row in counted if float(row["fraction_of_copy"]) < TARGET]
        if counted:
            worst = min(counted, key=lambda row: float(row["fraction_of_copy"]))
            where = f"{worst['size']} {worst['dtype']} K={worst['k']}: {number(worst['fraction_of_copy'], 2)}"
            reached = f"{len(counted) - len(below)} of {len(counted)}"
            lines.append(f"{name}: target {TARGET} of a copy for K <= {TARGET_K} reached in {reached}; lowest {where}")
        lines += bits_cost(rows, name)
    reads = [float(row["fraction_of_copy"]) for row in rows if row["provider"] == READING and not failed(row)]
    if reads:
        lines.append(f"amax of the same rows: {min(reads):.2g} to {max(reads):.2g} of a copy's rate")
    return [*lines, *errors(rows)]


def bits_cost(rows: Sequence[Row], name: str) -> list[str]:
    found = [row for row in rows if not failed(row)]
    times = {(row["size"], row["dtype"], row["k"], row["provider"]): float(row["p50_ms"]) for row in found}
    ratios = sorted(
        times[size, dtype, k, name + BITS] / ms
        for (size, dtype, k, provider), ms in times.items()
        if provider == name and (size, dtype, k, name + BITS) in times
    )
    if not ratios:
        return []
    return [
        f"{name}: with the bits {ratios[len(ratios) // 2]:.2f} of the time without (median; at most {ratios[-1]:.2f})"
    ]
