"""Tables and sentences about single operations, from ``cpu.csv``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.pages.figures import Medians, bullets, duration, multiple, paragraph, table, where

VIT = ("masked_adam_", "ViT-B/16, 86 M")
LLAMA = ("masked_adam_, bfloat16", "Llama-3.2-1B, 2 layers")
RANKING = ("ranking", "ViT-B/16, PerNeuron")
SHARED = ("selected_weight_grad, 48 inputs used", "1576 tokens, 3072x768")
WIDE = ("selected_weight_grad", "512 tokens, 8192x2048")
DENSITY = ("masked_adam_, density", "4096x4096")
CROSS = "\N{MULTIPLICATION SIGN}"
TOPK_SIZES = ("3072x768", "4096x14336")
#: Tokens, rows and columns in the order of the table of strategies.
STRATEGY_SIZES = ("1576 tokens, 3072x768", "1576 tokens, 768x3072", "512 tokens, 8192x2048", "512 tokens, 2048x8192")
STRATEGIES = ("native, gather", "native, union", "native, tile", "native")


def times(size: str) -> str:
    return size.replace("x", f" {CROSS} ")


def against(ours: float, other: float) -> str:
    """Another method's time, and in bold as a multiple of ours."""
    return f"{duration(other)}: **{multiple(other / ours)}**"


def table_lines(medians: Medians) -> Iterator[list[str]]:
    for size in TOPK_SIZES:
        for k in (1, 8, 64):
            ours, torch = (medians.ms("topk_rows", size, k, name) for name in ("native", "g.abs().topk"))
            bits = medians.ms("topk_rows", size, k, "native, with bits")
            total = medians.ms("topk_rows", size, 0, "g.sum")
            yield [
                f"`topk_rows`, {times(size)}, K = {k}",
                f"{duration(ours)}, with the bitmask {duration(bits)}",
                f"`g.abs().topk(k)` {against(ours, torch)}"
                + (f"; a single `g.sum()` {duration(total)}" if k == 1 else ""),
            ]
    fused, published = (
        medians.ms(*VIT, 0, name) for name in ("torch Adam(fused), dense", "dense mask, then torch Adam(fused)")
    )
    for k in (1, 10):
        dense, attached = (medians.ms(*VIT, k, name) for name in ("native", "native, attached"))
        yield [
            f"`MaskedAdam.step`, ViT-B/16, K = {k}, dense gradients",
            duration(dense),
            f"dense `Adam(fused=True)` {against(dense, fused)}; masked gradients and dense Adam, as published, "
            f"{against(dense, published)}",
        ]
        others = [f"dense `Adam(fused=True)` {against(attached, fused)}"]
        if k == 1:
            others += [
                f"{words} {duration(medians.ms(*VIT, 0, name))}"
                for words, name in (
                    ("for-loop", "torch Adam(single), dense"),
                    ("bitsandbytes", "bitsandbytes Adam, dense"),
                    ("`foreach=True`", "torch Adam(foreach), dense"),
                )
            ]
        yield [f"`MaskedAdam.step`, ViT-B/16, K = {k}, attached", duration(attached), "; ".join(others)]
    ours = medians.ms(*LLAMA, 1, "native, attached", "bfloat16")
    masters, rounded = (
        medians.ms(*LLAMA, 0, name, "bfloat16")
        for name in ("dense float32 masters, torch Adam(fused)", "torch Adam(fused), dense, bfloat16 state")
    )
    yield [
        "`MaskedAdam.step`, attached, two bfloat16 layers of Llama-3.2-1B, K = 1",
        duration(ours),
        f"dense Adam with float32 masters {against(ours, masters)}; dense bfloat16 Adam without masters "
        f"{against(ours, rounded)}",
    ]
    ours, partitioned, everything = _ranking(medians)
    yield [
        "ranking all gradients of ViT-B/16, K = 1",
        duration(ours),
        f"NumPy's argpartition {against(ours, partitioned)}; sorting every row, as published, "
        f"{against(ours, everything)}",
    ]
    product, alone = (
        medians.ms(*SHARED, 0, name) for name in ("dense product alone", "product with the used inputs alone")
    )
    for k in (1, 10):
        ours = medians.ms(*SHARED, k, "native, and the bias")
        yield [
            f"`selected_weight_grad_bias`, {times('3072x768')}, 1576 tokens, 48 inputs used, K = {k}",
            duration(ours),
            f"dense product {against(ours, product)}; product with the used inputs alone {against(ours, alone)}",
        ]
    ours = medians.ms(*WIDE, 1, "native")
    yield [
        f"`selected_weight_grad`, {times('8192x2048')}, 512 tokens, random mask, K = 1",
        duration(ours),
        f"dense product {against(ours, medians.ms(*WIDE, 0, 'dense product alone'))}",
    ]
    for kernel in ("pack_bits", "unpack_bits"):
        ours, copy = (medians.ms(kernel, "4096x14336", 0, name, "bool") for name in ("native", "mask.copy_"))
        yield [f"`{kernel}`, {times('4096x14336')}", duration(ours), f"copying the boolean mask {duration(copy)}"]


def table_of_operations(results: Path) -> str:
    return table(["operation", "ours", "others"], table_lines(Medians(results)))


def faster_up_to(medians: Medians, provider: str) -> str:
    """At which shares of the selected entries a step is faster than a dense one."""
    dense = medians.ms(*DENSITY, 0, "torch Adam(fused), dense")
    columns = int(DENSITY[1].rpartition("x")[2])
    faster, largest = None, 0
    for k in medians.ks(*DENSITY, provider):
        largest = k
        if medians.ms(*DENSITY, k, provider) >= dense:
            break
        faster = k
    if faster is None:
        return "at no measured share of the entries"
    share = f"{100 * faster / columns:.2g} % of the entries"
    return f"up to {share}" + (", the largest share measured" if faster == largest else "")


def findings(results: Path) -> str:
    medians = Medians(results)
    sums = [
        medians.ms("topk_rows", size, 1, "native") / medians.ms("topk_rows", size, 0, "g.sum") for size in TOPK_SIZES
    ]
    small = ("MaskedAdam.step, many tensors", "10 tensors of 768", 1)
    return bullets(
        [
            f"Selection with K = 1 takes {min(sums):.1f} to {max(sums):.1f} times as long as a sum, which reads "
            "the gradient once.",
            "A step on dense gradients touches two scattered cache lines for each entry, so its advantage shrinks as K "
            f"grows; attached, it touches one. On one matrix of {times(DENSITY[1])} a step is faster than dense Adam "
            f"with dense gradients {faster_up_to(medians, 'native')}, and "
            f"attached {faster_up_to(medians, 'native, attached')}.",
            "A few small tensors leave little to save: with 10 tensors of 768 entries dense Adam takes "
            f"{duration(medians.ms(*small, 'torch Adam(fused), same tensors'))}, and `MaskedAdam` "
            f"{duration(medians.ms(*small, 'native'))}.",
        ]
    )


def _ranking(medians: Medians) -> tuple[float, float, float]:
    """Ours, NumPy's argpartition and sorting."""
    return (
        medians.ms(*RANKING, 1, "native"),
        medians.ms(*RANKING, 1, "argpartition"),
        medians.ms(*RANKING, 0, "argsort"),
    )


def ranking(results: Path) -> str:
    ours, partitioned, everything = _ranking(Medians(results))
    return paragraph(
        f"Ranking all gradients of ViT-B/16 at K = 1 takes {duration(ours)}, checks included. NumPy's argpartition "
        f"takes {multiple(partitioned / ours)} times as long, and sorting every row, as published code does, "
        f"{multiple(everything / ours)} times ([all policies](../benchmarks/results/cpu.csv), "
        "`python -m pytest benchmarks/selection/test_ranking.py`)."
    )


def strategies(results: Path) -> str:
    medians, kernel = Medians(results), "selected_weight_grad"
    lines = [
        [
            times(size.replace(" tokens", "")),
            str(k),
            *(
                f"{ms:.3g} ms"
                for ms in (
                    medians.ms(kernel, size, 0, "dense product alone"),
                    *(medians.ms(kernel, size, k, name) for name in STRATEGIES),
                )
            ),
        ]
        for size in STRATEGY_SIZES
        for k in medians.ks(kernel, size, "native")
    ]
    source = paragraph(
        f"Float32, random masks, measured on {where(medians.rows)} ([all numbers](../benchmarks/results/cpu.csv), "
        "`python -m pytest benchmarks/kernels/test_weight_grad.py`):"
    )
    head = ["tokens, weight", "K", "dense product", "gather", "union", "tile", "auto"]
    return f"{source}\n\n{table(head, lines)}"


def shared_inputs(results: Path) -> str:
    medians = Medians(results)
    copying, product, alone = (
        duration(medians.ms(*SHARED, 0, name))
        for name in ("take_columns", "dense product alone", "product with the used inputs alone")
    )
    one, ten = (duration(medians.ms(*SHARED, k, "native, and the bias")) for k in (1, 10))
    return paragraph(
        f"If all rows share 48 of 768 inputs, which forward copies out in {copying}, the gradient of a "
        f"{times('3072x768')} weight and its bias over 1576 tokens takes {one} at K = 1 and {ten} at K = 10. The dense "
        f"product takes {product}, and torch's product with those 48 inputs alone {alone}."
    )
