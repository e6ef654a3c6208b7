"""The part "adam": optimizer steps of ViT-B/16 and of a model with a billion weights, against dense fused Adam.

Both routes are measured as users call them: attached (only the gradients of the selected entries exist) and drop-in
(dense gradients). For the attached route, the operator alone and the step as a CUDA graph are measured as well. Steps
are timed one at a time with a flushed cache, see harness/timing.py; ``wall_p50_ms`` is what they take on the host, one
after the other. Where an entry lies in a dense tensor, the bytes that a step has to move are counted in sectors of 32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from benchmarks.harness.bench import Bench, Provider, Refused
from benchmarks.harness.clock import launches
from benchmarks.harness.results import REFUSED, Row, failed
from benchmarks.harness.tables import errors, number, over_k
from benchmarks.harness.timing import Call
from gradsel.experiments.cost.timing import Function, first_line
from gradsel.masks import Frozen, Mask, PerRow, Whole
from gradsel.papers.vit import VisionTransformer
from gradsel.parameters.rules import parameter_rules

BASELINE = "torch Adam(fused), dense"
SECTOR = 32
STEP, COMPACT, LAUNCHES = "optimizer step", "masked_adam_, compact", "launches of a step"
#: Weights of one block of Llama-3.2-1B: query, key, value, output, gate, up, down.
LLAMA = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
NNZ = (10**6, 10**7, 10**8)


def vit(small: bool) -> nn.Module:
    return VisionTransformer(image_size=32, patch=8, dim=32, depth=1, heads=2) if small else VisionTransformer()


def linears(small: bool) -> nn.Module:
    shapes = [(64, 32), (32, 64)] if small else LLAMA * 16
    return nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)


MODELS: dict[str, Callable[[bool], nn.Module]] = {"ViT-B/16": vit, "Llama-3.2-1B, linear": linears}
#: Model, dtype and K, the important ones first.
CASES: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
    ("ViT-B/16", torch.float32, (1, 2, 5, 10)),
    ("Llama-3.2-1B, linear", torch.bfloat16, (1, 2, 5, 10)),
    ("Llama-3.2-1B, linear", torch.float32, (1, 2, 5, 10)),
]


def random_selection(model: nn.Module, k: int) -> gradsel.Selection:
    """K random entries of every neuron, the rest by the usual rules; without our own kernels, which may be broken."""
    parameters, masks = dict(model.named_parameters()), {}
    for name, rule in parameter_rules(model).items():
        shape = tuple(parameters[name].shape)
        mask: Mask = Whole(shape) if rule.action == "whole" else Frozen(shape, rule.reason)
        if rule.action == "rank":
            scores = torch.rand(shape[0], parameters[name].numel() // shape[0], device=parameters[name].device)
            cols = scores.topk(min(k, scores.shape[1]), sorted=False).indices.sort(1).values
            mask = PerRow(cols.to(torch.int32), shape)
        masks[name] = mask
    return gradsel.Selection(masks, {"policy": f"random {k}"})


def with_gradients(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return list(parameters)


def _replay(graph: torch.cuda.CUDAGraph, optimizer: torch.optim.Optimizer) -> None:
    graph.replay()


@dataclass
class Subject:
    """A model at one K and its optimizers, each made when first needed, on weights of its own."""

    bench: Bench
    name: str
    dtype: torch.dtype
    k: int

    def model(self) -> nn.Module:
        with torch.device(self.bench.device):
            return MODELS[self.name](self.bench.small).to(self.dtype)

    @cached_property
    def dense(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(with_gradients(list(self.model().parameters())), lr=1e-5, fused=True)

    @cached_property
    def attached_model(self) -> nn.Module:
        model = self.model()
        gradsel.attach(model, random_selection(model, self.k))
        with_gradients(gradsel.trainable_parameters(model))
        return model

    @cached_property
    def attached(self) -> gradsel.MaskedAdam:
        return gradsel.MaskedAdam(gradsel.trainable_parameters(self.attached_model), lr=1e-5)

    @cached_property
    def drop_in(self) -> gradsel.MaskedAdam:
        model = self.model()
        selection = random_selection(model, self.k)
        gradsel.freeze(model, selection)
        with_gradients(gradsel.trainable_parameters(model))
        return gradsel.MaskedAdam(list(model.named_parameters()), lr=1e-5, masks=selection)

    def captured(self) -> Function:
        """A step of an optimizer of its own as a CUDA graph."""
        if not self.bench.clock.cuda:
            raise Refused("there are no CUDA graphs on the CPU")
        parameters = gradsel.trainable_parameters(self.attached_model)
        optimizer = gradsel.MaskedAdam(parameters, lr=1e-5, capturable=True)
        for _ in range(3):
            optimizer.step()
        try:
            graph = self.bench.clock.capture(optimizer.step)
        except RuntimeError as error:
            if "captured in a CUDA graph" in str(error):
                raise Refused(first_line(error)) from None
            raise
        # The graph knows only addresses: what lies there has to live for as long as it is replayed.
        return functools.partial(_replay, graph, optimizer)

    def operator(self) -> Function:
        """The calls of the operator that a first step makes; later ones repeat them without the operator."""
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(self.attached_model), lr=1e-5)
        recorded: list[dict[str, Any]] = []
        original = gk.masked_adam_

        def record(*args: Any, **kwargs: Any) -> None:
            recorded.append(kwargs)
            original(*args, **kwargs)

        gk.masked_adam_ = record
        try:
            optimizer.step()
        finally:
            gk.masked_adam_ = original

        @torch.no_grad()
        def call() -> None:
            for kwargs in recorded:
                original(**kwargs)

        return call

    def moved(self) -> dict[str, int]:
        """Bytes of a step by route: of each partly selected entry, and 28 for an entry that is trained whole.

        Attached: index, value read and written, gradient, two moments read and written, and the sector of the weight
        written. Drop-in: index, moments, the sector of the gradient read, that of the weight read and written, and of
        weights in half precision the master copy read and written.
        """
        with torch.device("meta"):
            model = MODELS[self.name](self.bench.small).to(self.dtype)
            rules = parameter_rules(model)
        total = partly = whole = 0
        for name, parameter in model.named_parameters():
            total += parameter.numel()
            partly += min(self.k * parameter.shape[0], parameter.numel()) if rules[name].action == "rank" else 0
            whole += parameter.numel() if rules[name].action == "whole" else 0
        master = 8 if self.dtype.itemsize == 2 else 0
        return {
            "dense": 7 * self.dtype.itemsize * total,
            "attached": partly * (32 + SECTOR) + 28 * whole,
            "drop-in": partly * (20 + master + 3 * SECTOR) + 28 * whole,
        }


def providers(subject: Subject, dense: Subject) -> dict[str, Provider]:
    """All ways to make a step. ``dense`` has the baseline, which does not depend on K."""
    bench, moved = subject.bench, subject.moved()

    def step(make: Callable[[], Function], route: str, backend: str | None = None) -> Call:
        if backend is None:
            return Call([make()], moved[route], None, graph=False, cold=True, wall=True)
        with gk.use_backend(bench.backend(backend)):
            return Call([make()], moved[route], backend, graph=False, cold=True, wall=True)

    made: dict[str, Provider] = {BASELINE: lambda: step(lambda: dense.dense.step, "dense")}
    for name in bench.backends:
        made[f"{name}, attached"] = lambda b=name: step(lambda: subject.attached.step, "attached", b)
        made[f"{name}, attached, operator alone"] = lambda b=name: step(subject.operator, "attached", b)
        made[f"{name}, attached, CUDA graph"] = lambda b=name: step(subject.captured, "attached", b)
        made[f"{name}, dense gradients"] = lambda b=name: step(lambda: subject.drop_in.step, "drop-in", b)
    return made


def measure_steps(bench: Bench) -> None:
    firsts = [(name, dtype, ks[:1]) for name, dtype, ks in CASES]  # all models first, in case time runs out
    for name, dtype, ks in CASES if bench.small else [*firsts, *CASES]:
        dense = Subject(bench, name, dtype, 0)
        for k in ks[:2] if bench.small else ks:
            subject = Subject(bench, name, dtype, k)
            made = providers(subject, dense)
            bench.compare(STEP, name, str(dtype).removeprefix("torch."), k, made, BASELINE, seconds=1.0, expected=12.0)
            del subject, made
            bench.release()


# --- The operator where launching it no longer counts ----------------------------------------------------------------


def compact_calls(bench: Bench, nnz: int, backend: str | None) -> Call:
    """Values and gradients in mask order: 28 bytes an entry, all of them side by side."""
    copies = bench.clock.sets(16 * nnz)
    made = [
        [torch.randn(nnz, device=bench.device) for _ in range(2)]
        + [torch.zeros(nnz, device=bench.device) for _ in range(2)]
        for _ in range(copies)
    ]
    if backend is None:
        functions = []
        for value, grad, *_ in made:
            parameter = nn.Parameter(value)
            parameter.grad = grad
            functions.append(torch.optim.Adam([parameter], lr=1e-5, fused=True).step)
        return Call(functions, 28 * nnz, None, graph=False)

    @torch.no_grad()
    def step(tensors: list[Tensor], count: Tensor) -> None:
        value, grad, first, second = tensors
        gk.masked_adam_([None], [grad], [first], [second], [count], lr=1e-5, values=[value])

    counts = [torch.zeros((), device=bench.device) for _ in made]
    functions = [lambda t=t, c=c: step(t, c) for t, c in zip(made, counts, strict=True)]
    return Call(functions, 28 * nnz, bench.backend(backend))


def measure_compact(bench: Bench) -> None:
    for nnz in (1000, 3000) if bench.small else NNZ:
        made: dict[str, Provider] = {BASELINE: lambda nnz=nnz: compact_calls(bench, nnz, None)}
        made |= {name: lambda b=name, nnz=nnz: compact_calls(bench, nnz, b) for name in bench.backends}
        bench.compare(COMPACT, f"{nnz:.0e} entries", "float32", "", made, BASELINE, expected=6.0)
        bench.release()


# --- Launches --------------------------------------------------------------------------------------------------------


def measure_launches(bench: Bench) -> None:
    """Runs last, because a profiler that has been on once may slow down what follows."""
    if not bench.clock.cuda:
        return
    for name, dtype, _ in CASES:
        subject = Subject(bench, name, dtype, 1)
        case = (LAUNCHES, name, str(dtype).removeprefix("torch."), 1)
        for provider, make in providers(subject, subject).items():
            if provider in bench.found(*case):
                continue
            bench.need(8.0)
            try:
                call = make()
                with gk.use_backend(call.backend):
                    said = launches(call.functions[0])
            except Refused as error:
                said = f"{REFUSED}{error}"
            except Exception as error:
                said = f"error: {first_line(error)}"
                bench.clock.check()
            bench.note(*case, provider, said)
        bench.release()


def measure(bench: Bench) -> None:
    torch.manual_seed(0)
    measure_steps(bench)
    measure_compact(bench)
    measure_launches(bench)


def table(rows: Sequence[Row]) -> list[str]:
    """Device and host time over K for every model, the compact operator's fraction of a copy, and launches."""
    steps = sorted(
        (row for row in rows if row["operation"] == STEP),
        key=lambda row: (row["provider"] != BASELINE, row["provider"]),
    )
    counts = {(row["size"], row["dtype"], row["provider"]): row["extra"].partition(" ")[0] for row in rows
              if row["operation"] == LAUNCHES and not failed(row) and not row["extra"].startswith(REFUSED)}  # fmt: skip
    lines = ["device ms / host ms (speedup of device time over dense); launches"]
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in steps):
        lines += over_k(
            [row for row in steps if (row["size"], row["dtype"]) == (size, dtype)],
            lambda row: row["provider"] + (f" [{counts[at]}]" if (at := (row["size"], row["dtype"], row["provider"]))
                                           in counts else ""),
            lambda row: "refused" if row["extra"].startswith(REFUSED) else
            f"{number(row['p50_ms'])}/{number(row['wall_p50_ms'])} ({number(row['speedup'])}x)",
            f"{size} {dtype}",
        )  # fmt: skip
    for row in rows:
        if row["operation"] == COMPACT and not failed(row):
            fraction = f"{number(row['fraction_of_copy'], 2)} of a copy's rate"
            lines.append(f"{row['size']}, {row['provider']}: {number(row['p50_ms'])} ms ({row['method']}), {fraction}")
    return [*lines, *errors(rows)]
