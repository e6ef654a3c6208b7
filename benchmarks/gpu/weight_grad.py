"""The part "weight_grad": every strategy of selected_weight_grad against the dense product, and the rule that chooses.

Gradients cluster: most rows select from few columns, which forward then copies so that the tokens of a column are
adjacent. Random masks use all columns, and the input stays as it is. Both are measured, because their reads differ, and
so does the number of entries above which a dense product is faster. At the end, the constants of the rule in
gradsel_kernels/triton/weight_grad.py are worked out from the times, to be compared with those written there.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

import gradsel_kernels as gk
from benchmarks.harness.bench import Bench, Provider
from benchmarks.harness.results import Row, failed
from benchmarks.harness.tables import errors, over_k
from benchmarks.harness.timing import Call

#: (tokens, rows, columns), the important ones first: ViT-B/16 at batch 32, Llama-3.2-1B, few tokens.
SHAPES = [
    (6304, 3072, 768), (6304, 768, 3072), (4096, 2048, 8192), (1024, 2048, 8192), (4096, 8192, 2048), (197, 3072, 768),
    (64, 2048, 8192),
]  # fmt: skip
SMALL = [(40, 24, 32)]
KS: tuple[int | str, ...] = (1, 10, 2, 5, 32, "10 %")
#: A first pass, so that all kinds are measured even if time runs out.
FIRST, FIRST_KS = 4, (1, 10, "10 %")
DTYPES = (torch.bfloat16, torch.float32)
CLUSTERED, RANDOM = "clustered", "random"
STRATEGIES = ("gather", "tile", "union")
DENSE, PICKED = "dense product", "dense product, then gather"
#: The fewest columns that are used where they cluster.
USED = 48


def used_columns(n: int, k: int) -> int:
    return min(n, max(USED, 2 * k))


@cache
def wrong(backend: str, device: torch.device, dtype: torch.dtype, strategy: str) -> str | None:
    """How far a strategy is from float64 on a shape that no tile fits; each is checked once."""
    tokens, rows, n, k = 131, 67, 133, 5
    grad_output, input = (torch.randn(tokens, size).to(dtype) for size in (rows, n))
    cols = torch.rand(rows, n).topk(k).indices.sort(1).values
    expected = (grad_output.double().T @ input.double()).gather(1, cols)
    with gk.use_backend(backend):
        moved = (tensor.to(device) for tensor in (grad_output, input, cols.to(torch.int32)))
        found = gk.selected_weight_grad(*moved, strategy)
    error = float((found.cpu().double() - expected).norm() / expected.norm())
    return None if error < 1e-5 else f"relative error {error:.2g} against float64, {strategy}, {dtype}"


class Inputs:
    """The tensors of one shape, in so many copies that none is found in the cache."""

    def __init__(self, bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, pattern: str, k: int) -> None:
        tokens, rows, n = shape
        device = bench.device
        self.copies = bench.clock.sets(tokens * (rows + n) * dtype.itemsize)
        self.grad_outputs = [torch.randn(tokens, rows, device=device, dtype=dtype) for _ in range(self.copies)]
        self.inputs = [torch.randn(tokens, n, device=device, dtype=dtype) for _ in range(self.copies)]
        self.kept = self.inputs
        used = n
        if pattern == CLUSTERED:
            used = used_columns(n, k)
            columns = torch.randperm(n, device=device)[:used].sort().values
            self.kept = [input[:, columns].mT.contiguous().mT for input in self.inputs]
        self.cols = torch.rand(rows, used, device=device).topk(k, sorted=False).indices.sort(1).values
        self.cols32 = self.cols.to(torch.int32)
        #: Bytes of the selected gradient: what it reads once and writes.
        self.moved = dtype.itemsize * tokens * (rows + used) + 8 * rows * k


def entries(k: int | str, n: int) -> int:
    return k if isinstance(k, int) else round(0.1 * n)


def providers(
    bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, pattern: str, k: int
) -> dict[str, Provider]:
    tokens, rows, n = shape
    dense_bytes = dtype.itemsize * (tokens * (rows + n) + rows * n)

    @lru_cache(maxsize=1)
    def inputs() -> Inputs:
        return Inputs(bench, shape, dtype, pattern, k)

    def pairs(x: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs().grad_outputs, x, strict=True))

    def dense() -> Call:
        return Call([lambda g=g, x=x: g.mT @ x for g, x in pairs(inputs().inputs)], dense_bytes)

    def picked() -> Call:
        cols = inputs().cols
        return Call([lambda g=g, x=x: (g.mT @ x).gather(1, cols) for g, x in pairs(inputs().kept)], inputs().moved)

    def ours(name: str, strategy: str) -> Call:
        backend = bench.backend(name)
        if difference := wrong(backend, bench.device, dtype, strategy):
            raise AssertionError(difference)
        cols = inputs().cols32  # one tensor for all copies: what union multiplies is kept for as long as it lives
        return Call(
            [lambda g=g, x=x: gk.selected_weight_grad(g, x, cols, strategy) for g, x in pairs(inputs().kept)],
            inputs().moved, backend,
        )  # fmt: skip

    made: dict[str, Provider] = {DENSE: dense, PICKED: picked}
    for name in bench.backends[:1]:  # the cuda backend uses Triton's
        for strategy in (*STRATEGIES, "auto"):
            made[f"{name}, {strategy}"] = lambda name=name, strategy=strategy: ours(name, strategy)
    return made


def size_text(shape: tuple[int, int, int], pattern: str) -> str:
    tokens, rows, n = shape
    return f"{tokens} tokens, {rows}x{n}, {pattern}"


def measure(bench: Bench) -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # as by default: float32 products in float32
    if bench.small:
        measure_shapes(bench, SMALL, KS[::2])
        return
    measure_shapes(bench, SHAPES[:FIRST], FIRST_KS)
    measure_shapes(bench, SHAPES, KS)  # skips what has been measured by then


def measure_shapes(bench: Bench, shapes: Sequence[tuple[int, int, int]], ks: Sequence[int | str]) -> None:
    for shape in shapes:
        for dtype in DTYPES:
            for pattern in (CLUSTERED, RANDOM):
                for given in ks:
                    k = entries(given, shape[2])
                    made = providers(bench, shape, dtype, pattern, k)
                    size, name = size_text(shape, pattern), str(dtype).removeprefix("torch.")
                    bench.compare("selected_weight_grad", size, name, k, made, DENSE, expected=4.0)
                    del made
                bench.release()


# --- Table, and the rule ---------------------------------------------------------------------------------------------

Times = dict[str, float]


def cases(rows: Sequence[Row]) -> dict[tuple[str, str, int], Times]:
    """Milliseconds by provider (without the backend's name) of every size, dtype and k."""
    found: dict[tuple[str, str, int], Times] = {}
    for row in rows:
        if not failed(row):
            provider = row["provider"] if row["provider"] in (DENSE, PICKED) else row["provider"].split(", ")[-1]
            found.setdefault((row["size"], row["dtype"], int(row["k"])), {})[provider] = float(row["p50_ms"])
    return found


def parts_of(size: str) -> tuple[int, int, int, str]:
    """Tokens, rows, columns and pattern of a size as it is written in the results."""
    tokens, shape, pattern = size.split(", ")
    rows, n = shape.split("x")
    return int(tokens.removesuffix(" tokens")), int(rows), int(n), pattern


def width(n: int, k: int, pattern: str) -> int:
    """Columns of the activation that backward gets."""
    return used_columns(n, k) if pattern == CLUSTERED else n


def table(rows: Sequence[Row]) -> list[str]:
    """The fastest strategy, its speedup over the dense product, and how much longer "auto" takes."""
    measured = cases(rows)
    letters = {"gather": "g", "tile": "t", "union": "u"}

    def cell(row: Row) -> str:
        times = measured.get((row["size"], row["dtype"], int(row["k"])), {})
        ours = {name: times[name] for name in STRATEGIES if name in times}
        if DENSE not in times or not ours:
            return "-"
        best = min(ours, key=ours.__getitem__)
        late = f" +{100 * (times['auto'] / ours[best] - 1):.0f}%" if times.get("auto", 0) > 1.05 * ours[best] else ""
        return f"{letters[best]} {times[DENSE] / ours[best]:.3g}x{late}"

    lines = ["fastest strategy (gather, tile, union), its speedup over the dense product, +: what auto takes longer"]
    lines += over_k(
        [row for row in rows if row["provider"] == DENSE and not failed(row)],
        lambda row: f"{row['size'].replace(' tokens, ', ' t, ')} {row['dtype']}", cell, "",
    )  # fmt: skip
    try:
        lines += constants(measured, importlib.import_module("gradsel_kernels.triton.weight_grad"))
    except ImportError as error:
        lines.append(f"the rule cannot be read: {error}")
    return [*lines, *errors(rows)]


def constants(measured: Mapping[tuple[str, str, int], Times], rule: ModuleType) -> list[str]:
    """What the times say the rule's constants are, and how often it would choose the slower of gather and tile."""
    rates: dict[str, list[float]] = {}
    written: dict[str, float] = {}
    chosen, slower, losses = 0, 0, []
    for (size, dtype, k), times in measured.items():
        if "gather" not in times or "tile" not in times:
            continue
        tokens, out, n, pattern = parts_of(size)
        itemsize = getattr(torch, dtype).itemsize
        adjoining = pattern == CLUSTERED
        columns = width(n, k, pattern)
        if k >= 10:  # with fewer entries the time is spent reading grad_output
            name = f"CACHE_RATE, {'adjoining' if adjoining else 'scattered'} {dtype}"
            read = k * (itemsize if adjoining else rule.SECTOR)
            rates.setdefault(name, []).append(read * tokens * out / (times["gather"] / 1e3))
            written[name] = rule.CACHE_RATE
        if tokens >= 1024 and pattern == RANDOM:
            name = f"DENSE_RATE[{itemsize}]"
            rates.setdefault(name, []).append(2 * columns * tokens * out / (times["tile"] / 1e3))
            written[name] = rule.DENSE_RATE[itemsize]
        choice = rule.choose(columns, float(k), itemsize, adjoining)
        other = "tile" if choice == "gather" else "gather"
        chosen += 1
        if times[choice] > 1.05 * times[other]:
            slower += 1
            losses.append((times[choice] / times[other], f"{size} {dtype} K={k} takes {choice}"))
    lines = [
        f"{name}: {written[name]:.3g} is written, the times say {statistics.median(found):.3g} "
        f"({min(found):.3g} to {max(found):.3g})"
        for name, found in sorted(rates.items())
    ]
    if chosen:
        worst = f"; worst: {max(losses)[1]}, {max(losses)[0]:.2f} of the other's time" if losses else ""
        lines.append(f"the rule takes the slower of gather and tile in {slower} of {chosen} cases{worst}")
    return lines + crossovers(measured)


def crossovers(measured: Mapping[tuple[str, str, int], Times]) -> list[str]:
    """Up to which K each strategy is the fastest, a line for each dtype and pattern."""
    ranges: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (size, dtype, k), times in measured.items():
        ours = {name: times[name] for name in STRATEGIES if name in times}
        if not ours:
            continue
        _, _, n, pattern = parts_of(size)
        best = min(ours, key=ours.__getitem__)
        if times.get(PICKED, times[best]) < times[best]:
            best = PICKED
        ranges.setdefault((dtype, pattern), {}).setdefault(best, []).append(k / width(n, k, pattern))
    return [
        f"fastest, {dtype} {pattern}, by K over columns: "
        + "; ".join(f"{name} {min(found):.2g} to {max(found):.2g} ({len(found)}x)" for name, found in best.items())
        for (dtype, pattern), best in sorted(ranges.items())
    ]
