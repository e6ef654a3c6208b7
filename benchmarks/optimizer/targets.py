"""How near a step of the optimizer is to what it could cost: ``python -m benchmarks.optimizer.targets``.

Each case has a baseline and contenders, in rounds whose order is drawn anew, on two threads. A sample is taken in one
of two ways: ``loop``, the mean of calls in a row after some that are not timed, as in a loop of nothing else; ``cold``,
one call after 512 MB have been written, as in a training loop whose forward and backward fill the caches.

- An attached step of ViT-B/16 against dense ``torch.optim.Adam(fused=True)`` of the whole model.
- A step of small tensors against the C++ function that does its arithmetic, called with the same table. The rest is
  Python, checks and dispatch.
- A step on dense gradients against ``bare_loop.cpp``, which reads and writes the selected entries and does no more.
- The step that selects against ranking alone, and ranking against one read of the matrix.

Results go to ``benchmarks/results/targets-cpu.csv``; rows of an earlier run with the same key are replaced.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import merge
from gradsel.experiments.cost.timing import percentiles, shuffled
from gradsel.masks import PerRow, Whole
from gradsel_kernels.adam_call import AdamOptions
from gradsel_kernels.backends import native
from tests.cuda.build import compiler

FIELDS = [
    "benchmark", "size", "sampled", "provider", "p20_us", "p50_us", "p80_us", "rounds", "baseline", "measure",
    "measured", "goal", *MACHINE,
]  # fmt: skip
KEY = ("benchmark", "size", "sampled", "provider", "measure", "device", "threads")
FLUSHED = 1 << 29  # bytes, more than the caches hold
BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
Function = Callable[[], object]


class Case(NamedTuple):
    """What is compared.

    Attributes:
        providers: name to call; the baseline first.
        goals: of the last provider, by measure: ``us`` (its median), ``times`` (the median of its ratios to the
            baseline), ``faster`` (of the inverse), ``over`` (of the differences, in microseconds), ``over each`` (the
            same by tensor). Providers in between get these measures as well, without goals.
        tensors: how many there are.
        calls: in a row, of the fastest.
    """

    benchmark: str
    size: str
    sampled: str
    providers: dict[str, Function]
    goals: dict[str, str]
    tensors: int = 1
    calls: int = 20


def vit(blocks: int = 12) -> list[tuple[str, nn.Parameter]]:
    """The parameters of ViT-B/16 with a head of 10 classes, with dense gradients."""
    shapes = [(768, 768), (768,)]
    for _ in range(blocks):
        shapes += [shape for rows, cols in BLOCK for shape in ((rows, cols), (rows,))] + [(768,)] * 4
    shapes += [(768,), (768,), (10, 768), (10,)]
    named = [(f"p{i}", nn.Parameter(torch.randn(shape))) for i, shape in enumerate(shapes)]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    return named


def selection_of(named: list[tuple[str, nn.Parameter]], k: int) -> gradsel.Selection:
    """K random entries of each row; biases, norms and the head whole."""
    return gradsel.Selection(
        {
            name: PerRow(gk.topk_rows(torch.randn(p.shape), k), p.shape)
            if p.ndim == 2 and p.shape[0] > 10
            else Whole(p.shape)
            for name, p in named
        }
    )


class Attached(nn.Module):
    """A model of parameters, attached, and its optimizer after two steps."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], k: int) -> None:
        super().__init__()
        for name, parameter in named:
            self.register_parameter(name, parameter)
        gradsel.attach(self, selection_of(named, k))
        parameters = gradsel.trainable_parameters(self)
        self.tensors, self.entries = len(parameters), sum(p.numel() for p in parameters)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        self.adam = gradsel.MaskedAdam(parameters)

    def step(self) -> None:
        self.adam.step()


# --- Cases -------------------------------------------------------------------------------------------------------


def attached_steps(blocks: int) -> Iterator[Case]:
    dense = torch.optim.Adam([p for _, p in vit(blocks)], fused=True)
    ours = Attached(vit(blocks), 1)
    size = f"{ours.tensors} tensors, {ours.entries:,} entries"
    for sampled, milliseconds, times in (("loop", 0.15, 100), ("cold", 0.45, 60)):
        providers = {"torch Adam(fused), dense": dense.step, "attached": ours.step}
        goals = {"us": f"<= {milliseconds * 1000:.0f} us", "faster": f">= {times}x"}
        yield Case("attached step, K = 1", size, sampled, providers, goals)


def kernel_of(adam: gradsel.MaskedAdam) -> Function:
    """The C++ function that a step of one group ends in, with the table of that step."""
    adam.step()
    adam.step()
    (repeated,) = adam._plans[0]._repeated
    count, threads = len(repeated._call.exp_avgs), torch.get_num_threads()
    options = AdamOptions(1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, 0.0, False, False)
    return lambda: native.module().masked_adam(repeated._table.address, count, *options, 1.0, threads)


def overheads(sizes: dict[int, dict[str, str]]) -> Iterator[Case]:
    for count, goals in sizes.items():
        made = []
        for _ in range(2):
            parameters = [nn.Parameter(torch.randn(768, 1)) for _ in range(count)]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            made.append(gradsel.MaskedAdam(parameters))
        kernel = kernel_of(made[0])
        made[1].step()
        providers = {"the kernel alone": kernel, "MaskedAdam.step": made[1].step}
        yield Case("Python and dispatch", f"{count} tensors of 768", "loop", providers, goals, count)


def bare_loop(folder: Path) -> Callable[..., Function]:
    """Compiles bare_loop.cpp; what is returned makes a call of it."""
    cxx = compiler()
    if cxx is None:
        raise SystemExit("targets needs a C++ compiler for bare_loop.cpp")
    source, library = Path(__file__).with_name("bare_loop.cpp"), folder / "bare_loop.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([*cxx, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).bare_loop

    def call(
        weights: list[Tensor], grads: list[Tensor], indices: list[Tensor], k: int, moments: bool = False
    ) -> Function:
        count = len(weights)
        states = [[torch.zeros(index.shape if moments else (0,)) for index in indices] for _ in range(2)]
        tensors = (weights, grads, indices, *states)
        tables = [(ctypes.c_void_p * count)(*map(Tensor.data_ptr, each)) for each in tensors]
        shapes = [(ctypes.c_int64 * count)(*(w.shape[i] for w in weights)) for i in (0, 1)]
        last = ctypes.c_int64(k), ctypes.c_bool(moments), torch.get_num_threads()
        fixed = (ctypes.c_int64(count), *tables, *shapes, *last)
        return lambda: (function(*fixed), tensors)[0]  # which have to live

    return call


def dense_gradients(blocks: int, folder: Path) -> Iterator[Case]:
    bare = bare_loop(folder)
    for k in (1, 10):
        named = [(name, p) for name, p in vit(blocks) if p.ndim == 2 and p.shape[0] > 10]
        selection = selection_of(named, k)
        adam = gradsel.MaskedAdam(named, masks=selection)
        # The same tensors for all: where matrices lie in memory makes a difference of a third.
        weights, grads = [p.detach() for _, p in named], [p.grad for _, p in named if p.grad is not None]
        indices = [mask.cols for mask in selection.values()]
        providers = {
            "bare gather and scatter": bare(weights, grads, indices, k),
            "bare loop with moments": bare(weights, grads, indices, k, moments=True),
            "MaskedAdam.step, dense gradients": adam.step,
        }
        size = f"ViT-B/16's matrices, K = {k}"
        for sampled in ("loop", "cold"):
            yield Case("step on dense gradients", size, sampled, providers, {"times": "<= 1.15x"}, calls=5)


def selections(blocks: int) -> Iterator[Case]:
    pairs = [p for _, p in vit(blocks) if p.ndim == 2 and p.shape[0] > 10]
    weights, grads = [p.detach() for p in pairs], [p.grad for p in pairs if p.grad is not None]
    providers: dict[str, Function] = {
        "ranking alone": lambda: [gk.topk_rows(grad, 1) for grad in grads],
        # as MaskedAdam calls it: without packed masks, which ranking alone does not make either
        "topk_masked_adam_": lambda: gk.topk_masked_adam_(weights, grads, 1, lr=1e-6, bits=False),
    }
    yield Case("first step, which selects", "ViT-B/16's matrices, K = 1", "cold", providers, {"times": "<= 1.1x"})
    grad = torch.randn(3072, 768)
    for k in (1, 2, 4, 8):
        read: dict[str, Function] = {"g.sum()": lambda: grad.sum(), "topk_rows": lambda k=k: gk.topk_rows(grad, k)}
        yield Case("topk_rows against one read", f"3072x768, K = {k}", "loop", read, {"times": "<= 1.3x"})


# --- Measuring ---------------------------------------------------------------------------------------------------


def sample(run: Function, case: Case, flush: Tensor) -> float:
    """Microseconds of one call."""
    calls = 1
    if case.sampled == "cold":
        flush.add_(1)
    else:
        run()
        start = time.perf_counter()
        run()
        calls = max(1, min(case.calls, int(0.02 / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e6 * (time.perf_counter() - start) / calls


def compared(times: list[float], baseline: list[float], tensors: int) -> dict[str, float]:
    """Every measure of samples and the samples of the baseline in the same rounds."""
    pairs = list(zip(times, baseline, strict=True))
    over = percentiles([ours - other for ours, other in pairs])[1]
    return {
        "us": percentiles(times)[1],
        "times": percentiles([ours / other for ours, other in pairs])[1],
        "faster": percentiles([other / ours for ours, other in pairs])[1],
        "over": over,
        "over each": over / tensors,
    }


def measured(case: Case, rounds: int, flush: Tensor) -> list[dict[str, Any]]:
    """The rows of a case: a round is one sample of every provider."""
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for run in case.providers.values():
        run()
        run()
    for _, order in zip(range(rounds), shuffled(times), strict=False):
        for name in order:
            times[name].append(sample(case.providers[name], case, flush))
    baseline, *_, last = case.providers
    rows = []
    for name, values in times.items():
        numbers = compared(values, times[baseline], case.tensors)
        p20, p50, p80 = (f"{value:.1f}" for value in percentiles(values))
        for measure, goal in case.goals.items() if name != baseline else [("", "")]:
            number = f"{numbers[measure]:.3g}" if measure else ""
            rows.append(
                {
                    "benchmark": case.benchmark, "size": case.size, "sampled": case.sampled, "provider": name,
                    "p20_us": p20, "p50_us": p50, "p80_us": p80, "rounds": rounds, "baseline": baseline,
                    "measure": measure, "measured": number, "goal": goal if name == last else "", **machine(),
                }
            )  # fmt: skip
            print(
                f"{case.benchmark:<26}{case.size:<32}{case.sampled:<5}{name:<34}{p50:>9} us  {number} {measure} {goal}"
            )
    return rows


def cases(small: bool, folder: Path) -> Iterator[Case]:
    blocks = 1 if small else 12
    yield from attached_steps(blocks)
    yield from overheads(
        {
            10: {"over": "<= 15 us"},
            150: {"over": "<= 60 us"},
            20 if small else 1000: {"over each": "<= 0.4 us a tensor"},
        }
    )
    yield from dense_gradients(blocks, folder)
    yield from selections(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="samples of each (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program; writes nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rounds = 3 if arguments.small else arguments.rounds
    flush = torch.zeros((FLUSHED >> 8 if arguments.small else FLUSHED) // 4)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for case in cases(arguments.small, Path(folder)):
            rows += measured(case, rounds, flush)
    if not arguments.small:
        merge(RESULTS / "targets-cpu.csv", FIELDS, KEY, rows)


if __name__ == "__main__":
    main()
