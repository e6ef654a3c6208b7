"""Tests on a GPU, and what they share. Where there is none they are skipped.

GRADSEL_GPU_TESTS_ON=cpu in the environment runs them on CPU tensors and the native backend instead, so that whoever has
no GPU can at least test the tests; with TRITON_INTERPRET=1, too, on Triton's interpreter, with GRADSEL_EMULATE_CUDA=1
on the emulated GPU. What exists on CUDA only (streams, graphs, the allocator's statistics) then becomes its nearest
relative on the CPU, and large tensors become small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout
from gradsel_kernels._checks import sum_dtype
from tests.conftest import EMULATED
from tests.kernels import cases
from tests.kernels.adam_cases import Problem, masks
from tests.support.memory import peak_bytes

ON_CPU = os.environ.get("GRADSEL_GPU_TESTS_ON") == "cpu"
BACKENDS = ["triton", "cuda"]
if ON_CPU:
    BACKENDS = ["triton"] if cases.INTERPRETED else ["cuda"] if EMULATED else ["native"]
#: Options of an optimizer whose steps are captured.
CAPTURABLE = {} if ON_CPU else {"capturable": True}

#: What a call may take beyond its outputs: tables, counts of tiles, the allocator's rounding.
WORKSPACE = 2**20

SIZE = 300


def matrices(device: str, count: int) -> list[Tensor]:
    return [torch.randn(SIZE, SIZE).to(device) for _ in range(count)]


def same(left, right) -> bool:
    return all(cases.same_bits(a, b) for a, b in zip(left, right, strict=True))


def adam(x: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
    """The first step on a copy of ``x``, which is the gradient too."""
    weight, dtype = x.clone(), sum_dtype(x.dtype)
    m, v = (torch.zeros(cols.shape, dtype=dtype, device=x.device) for _ in range(2))
    step = torch.zeros((), device=x.device)
    gk.masked_adam_([weight], [x], [m], [v], [step], lr=0.1, indices=[cols], layouts=[Layout.COLS])
    return weight, m, v, step


def first_step(x: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
    """Selection and first step on a copy of ``x``, which is the gradient too."""
    weight = x.clone()
    first = gk.topk_masked_adam_([weight], [x], 5, lr=0.1)
    return weight, first.cols[0], first.bits[0], first.exp_avgs[0], first.exp_avg_sqs[0], first.steps[0]


def weight_grad(strategy: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, cols: gk.selected_weight_grad_bias(x, x, cols, strategy)


#: Every operator as a function of one matrix [SIZE, SIZE] and of columns [SIZE, 5].
OPERATORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "topk_rows": lambda x, cols: (gk.topk_rows(x, 5),),
    "topk_rows, many": lambda x, cols: (gk.topk_rows(x, 40),),
    "topk_rows_bits": lambda x, cols: gk.topk_rows_bits(x, 5),
    "pack_bits": lambda x, cols: (gk.pack_bits(x > 0),),
    "unpack_bits": lambda x, cols: (gk.unpack_bits(gk.pack_bits(x > 0), SIZE),),
    "gather_rows": lambda x, cols: (gk.gather_rows(x, cols),),
    "scatter_rows_": lambda x, cols: (gk.scatter_rows_(x.clone(), cols, -x[:, :5]),),
    "take_columns": lambda x, cols: (gk.take_columns(x, cols[0]),),
    "selected_addmm_": lambda x, cols: (gk.selected_addmm_(x.clone(), x, cols, gk.gather_rows(x, cols).float()),),
    "selected_weight_grad, gather": weight_grad("gather"),
    "selected_weight_grad, tile": weight_grad("tile"),
    "selected_weight_grad, union": weight_grad("union"),
    "masked_adam_": adam,
    "topk_masked_adam_": first_step,
}


def columns(device: str) -> Tensor:
    return cases.random_cols(SIZE, SIZE, 5).to(device)


def one_of_each(dtype: torch.dtype, layouts: tuple[Layout, ...] = tuple(Layout), shape=(64, 96)) -> Problem:
    """A tensor of every layout with a dense gradient, and one that trains values by a compact gradient."""
    problem = Problem()
    own: dict[str, Any] = {"compact": False, "master": False, "earlier_steps": 3}
    for layout, index, nnz_shape in masks(*shape):
        if layout in layouts:
            problem.add(torch.randn(shape, dtype=torch.float64).to(dtype), index, layout, nnz_shape, **own)
    cols = cases.random_cols(*shape, 3)
    own |= {"compact": True, "master": True}
    problem.add(torch.randn(shape, dtype=torch.float64).to(dtype), cols, Layout.COLS, tuple(cols.shape), **own)
    return problem


def copy_gradients(source: Problem, target: Problem) -> None:
    for mine, theirs in zip(source.grads, target.grads, strict=True):
        theirs.copy_(mine)


def differing(left: Problem, right: Problem) -> list[str]:
    """What a step may write and is not the same, to the bit."""
    names = ("weights", "values", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "compensations")
    return [
        f"{name}[{i}], {left.layouts[i].name}"
        for name in names
        for i, (a, b) in enumerate(zip(getattr(left, name), getattr(right, name), strict=True))
        if (a is None) != (b is None) or (a is not None and not cases.same_bits(a.cpu(), b.cpu()))
    ]


# --- CUDA, or what stands for it on the CPU ----------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def new_stream(device: str) -> torch.cuda.Stream | None:
    return torch.cuda.Stream() if device == "cuda" else None


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def keep_busy(device: str) -> None:
    """Some tens of milliseconds of work for the current stream, queued at once."""
    if device == "cuda":
        x = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
        y = torch.empty_like(x)
        for _ in range(40):
            torch.mm(x, x, out=y)


def peak_of(device: str, run: Callable[[], object]) -> int:
    """The most bytes of tensors that ``run`` has alive at a time, beyond those that were there before."""
    if device == "cpu":
        return peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """The host must not wait for the device.

    torch raises where it does so itself; where other code does, the work that was queued before is found done.
    """
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    keep_busy(device)
    done = torch.cuda.Event()
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not done.query(), "the host has waited for the device"


class Captured:
    """A function in a CUDA graph, run by :meth:`replay` only. What it returned is ``result``, written by a replay.

    It must have run before, on these or other tensors: compiling is not for a capture.
    """

    def __init__(self, device: str, run: Callable[[], Any]) -> None:
        self._run, self._graph = run, None
        self.result: Any = None
        if device == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(self._graph):
                    self.result = run()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails at its end does not give it back

    def replay(self) -> None:
        if self._graph is None:
            self.result = self._run()
        else:
            self._graph.replay()
