"""What a step of MaskedAdam costs over its entries: ``python -m benchmarks.optimizer.step``.

Every case compares a step with what bounds it, in turn and in an order that is drawn anew in every round:

- An attached step of ViT-B/16 (K = 1, biases and a head of 100 classes included) with dense Adam on the whole model:
  in a loop of their own, where the steps find their data in the caches, and after everything in the caches has been
  replaced, as forward and backward do.
- A step on 10, 150 and 1,000 tensors with the kernel's call alone: what Python and the checks add.
- A step on dense gradients with a bare loop over the selected entries in C (bare_loop.c), after the caches have been
  emptied; once more with weights and gradients on huge pages.
- The first step of ``MaskedAdam(policy=)`` with the ranking alone, as ``select()`` does it after its last batch.
- ``topk_rows`` with one sum over the matrix.

Results go to ``benchmarks/results/optimizer_step-cpu.csv``; rows of an earlier run with the same key are replaced.
Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import merge
from benchmarks.optimizer.bare_loop import BareLoop, on_huge_pages
from gradsel.experiments.cost.timing import percentiles, shuffled, time_calls
from gradsel.masks import PerRow
from gradsel.papers.vit import VisionTransformer, vit_base_patch16_224
from gradsel.parameters.rules import parameter_rules
from gradsel.ranking.criteria import criterion_of
from gradsel.ranking.selecting import Ranker

FIELDS = [
    "benchmark", "size", "provider", "p20_us", "p50_us", "p80_us", "rounds", "baseline", "ratio", "goal", *MACHINE,
]  # fmt: skip
KEY = ("benchmark", "size", "provider", "device", "threads")
LOOP, COLD, CALL = "attached step, in a loop", "attached step, caches emptied", "Python and checks"
DENSE, HUGE, FIRST, TOPK = "dense gradients", "dense gradients, huge pages", "first step", "top-K"
VIT = "ViT-B/16, K = 1"
#: Calls of one sample in a loop.
CALLS = 20
Calls = Mapping[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


class Case(NamedTuple):
    """What was measured; the baseline comes first. ``goal`` is that of the last provider."""

    benchmark: str
    size: str
    seconds: Seconds
    goal: str


class Sizes(NamedTuple):
    """How large and how long everything is."""

    rounds: int
    model: Callable[[], nn.Module]
    matrices: list[tuple[int, int]]
    flush: int  #: bytes that replace what the caches hold


FULL = Sizes(
    25,
    lambda: vit_base_patch16_224(num_classes=100),
    [(768, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12],
    1 << 29,
)
SMALL = Sizes(
    3,
    lambda: VisionTransformer(image_size=32, dim=32, depth=1, heads=2, num_classes=5),
    [(32, 32), (64, 32)],
    1 << 12,
)


def in_turn(calls: Calls, rounds: int, times: int = 1, before: Callable[[], Any] | None = None) -> Seconds:
    """Seconds of one call of each, round by round.

    Args:
        times: calls in a row that make one sample, after one that is not timed.
        before: is called before each sample.
    """
    seconds: Seconds = {name: [] for name in calls}
    for run in calls.values():
        run(), run()
    for order in shuffled(calls):
        if len(next(iter(seconds.values()))) >= rounds:
            return seconds
        for name in order:
            if before is not None:
                before()
            if times > 1:
                calls[name]()
            seconds[name].append(time_calls(calls[name], times)[0])
    raise AssertionError("shuffled() has no end")


# --- Cases -------------------------------------------------------------------------------------------------------


def with_grads(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def attached(sizes: Sizes) -> Iterator[Case]:
    ours, whole = with_grads(sizes.model()), with_grads(sizes.model())
    optimizer = gradsel.MaskedAdam(ours.named_parameters(), lr=1e-6, policy=gradsel.PerNeuron(1))
    optimizer.step()
    optimizer.attach(ours)
    with_grads(ours)
    dense = torch.optim.Adam(whole.parameters(), lr=1e-6, fused=True)
    filler = torch.zeros(sizes.flush // 4)
    calls = {"torch Adam(fused), whole model": dense.step, "attached": optimizer.step}
    yield Case(LOOP, VIT, in_turn(calls, sizes.rounds, CALLS // 4), "0.15 ms, 100 times as fast")
    yield Case(COLD, VIT, in_turn(calls, sizes.rounds, before=lambda: filler.add_(1)), "0.45 ms, 60 times as fast")


def overhead(sizes: Sizes) -> Iterator[Case]:
    for count, goal in ((10, "15 us more"), (150, "60 us more"), (1000, "0.4 us more for each")):
        values = [nn.Parameter(torch.randn(768, 1)) for _ in range(count)]
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer = gradsel.MaskedAdam(values, lr=1e-6)
        for _ in range(2):
            optimizer.step()
        calls = {"kernel's call alone": kernel_of(optimizer), "MaskedAdam": optimizer.step}
        yield Case(CALL, f"{count} tensors of 768", in_turn(calls, 4 * sizes.rounds, CALLS), goal)


def kernel_of(optimizer: gradsel.MaskedAdam) -> Callable[[], None]:
    """The call of the C++ kernel that a step makes, with the same table and hyperparameters, and nothing around it."""
    (plan,) = optimizer._plans.values()
    (repeated,) = plan._repeated
    options = (1e-6, 0.9, 0.999, 1e-8, 0.0, False, False, 0.0, False, False, 1.0)
    native, address = gk.backends.native.module(), repeated._table.address
    count, threads = len(optimizer.param_groups[0]["params"]), torch.get_num_threads()
    return lambda: native.masked_adam(address, count, *options, threads)


def dense_gradients(sizes: Sizes) -> Iterator[Case]:
    filler = torch.zeros(sizes.flush // 4)
    for benchmark, memory in ((DENSE, torch.randn), (HUGE, on_huge_pages)):
        weights, others = ([memory(*shape) for shape in sizes.matrices] for _ in range(2))
        grads, other_grads = ([memory(*shape) for shape in sizes.matrices] for _ in range(2))
        for k in (1, 10):
            cols = [gk.topk_rows(torch.randn(shape), k) for shape in sizes.matrices]
            named = [(f"matrix{i}", nn.Parameter(weight)) for i, weight in enumerate(weights)]
            for (_, parameter), grad in zip(named, grads, strict=True):
                parameter.grad = grad
            masks = {name: PerRow(c, tuple(p.shape)) for (name, p), c in zip(named, cols, strict=True)}
            ours = gradsel.MaskedAdam(named, lr=1e-6, masks=gradsel.Selection(masks))
            calls = {"bare loop": BareLoop(others, other_grads, [c.clone() for c in cols]), "MaskedAdam": ours.step}
            seconds = in_turn(calls, sizes.rounds, before=lambda: filler.add_(1))
            yield Case(benchmark, f"ViT-B/16, K = {k}", seconds, "at most 1.15")


def first_step(sizes: Sizes) -> Iterator[Case]:
    model = with_grads(sizes.model())
    rules = parameter_rules(model)
    ranked = {name: p for name, p in model.named_parameters() if rules[name].action == "rank"}

    def ranking() -> None:
        ranker = Ranker(gradsel.PerNeuron(1), criterion_of("gradient"), rules, ranked, loss_scale=1.0)  # type: ignore[arg-type]
        for name, parameter in ranked.items():
            ranker.add(name, parameter.grad)
        ranker.masks()
        gradsel.parameters.fingerprints.fingerprints(model)

    optimizer: list[gradsel.MaskedAdam] = []

    def anew() -> None:
        optimizer[:] = [gradsel.MaskedAdam(model.named_parameters(), lr=1e-9, policy=gradsel.PerNeuron(1))]

    anew()
    calls = {"ranking alone": ranking, "first step": lambda: (optimizer or [None])[0].step()}  # type: ignore[union-attr]
    yield Case(FIRST, VIT, in_turn(calls, max(3, sizes.rounds // 2), before=anew), "at most 1.1")


def topk(sizes: Sizes) -> Iterator[Case]:
    grad: Tensor = torch.randn(3072, 768)
    calls: dict[str, Callable[[], Any]] = {"g.sum": grad.sum}
    calls |= {f"K = {k}": lambda k=k: gk.topk_rows(grad, k) for k in (1, 2, 4, 8)}
    yield Case(TOPK, "3072x768", in_turn(calls, 2 * sizes.rounds, CALLS), "at most 1.3")


CASES: Sequence[Callable[[Sizes], Iterator[Case]]] = (overhead, attached, dense_gradients, first_step, topk)

# --- Results -----------------------------------------------------------------------------------------------------


def rows(case: Case) -> list[dict[str, Any]]:
    """One row for each provider."""
    baseline, found = next(iter(case.seconds)), []
    for name, values in case.seconds.items():
        ratios = [one / other for one, other in zip(values, case.seconds[baseline], strict=True)]
        p20, p50, p80 = (f"{1e6 * value:.1f}" for value in percentiles(values))
        found.append(
            {
                "benchmark": case.benchmark, "size": case.size, "provider": name,
                "p20_us": p20, "p50_us": p50, "p80_us": p80, "rounds": len(values), "baseline": baseline,
                "ratio": f"{statistics.median(ratios):.4f}", "goal": "" if name == baseline else case.goal, **machine(),
            }
        )  # fmt: skip
        print(f"{case.benchmark:<30}{case.size:<24}{name:<32}{float(p50):12.1f} us  {found[-1]['ratio']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program; writes nothing")
    names = [case.__name__ for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these cases (default: all)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = SMALL if arguments.small else FULL
    chosen = [case for case in CASES if case.__name__ in arguments.only]
    measured = [row for cases in chosen for case in cases(sizes) for row in rows(case)]
    if not arguments.small:
        merge(RESULTS / "optimizer_step-cpu.csv", FIELDS, KEY, measured)


if __name__ == "__main__":
    main()
