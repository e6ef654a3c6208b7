"""How far the C++ backend is from the specification: ``python -m benchmarks.kernels.numerics``.

A random search, without timing.

Masked Adam: each problem has random sizes, scales and options. Single steps begin from a random state, longer runs
carry their states along. The distance of an entry is counted in units in the last place (ULP) of the larger of its
magnitude and its update's, or, carried along, of its largest magnitude on the way.

Selected weight gradients: the largest error of an entry against the sum in float64, over what tests allow: the largest
error of the selected entries of torch's own dense product in float32, plus four epsilons of the sum of magnitudes.

``docs/numerics.md`` shows how these largest distances are spread over the problems of each kind.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict

import torch
from torch import Tensor
from tqdm.auto import tqdm

import gradsel_kernels as gk
from benchmarks.harness.environment import RESULTS, machine
from gradsel_kernels.backends import native

ADAM, WEIGHT_GRAD = RESULTS / "numerics-adam-cpu.csv", RESULTS / "numerics-weight-grad-cpu.csv"
STRATEGIES, PRODUCTS = ("gather", "tile", "union"), 400
#: What a problem has beside Adam itself.
KINDS = ("plain", "coupled decay", "decoupled decay", "anchor", "amsgrad")
#: Steps of a problem, and how many problems there are for each kind.
LENGTHS = {1: 400, 100: 150, 1000: 12}


class Problem:
    """Compact values with their states, twice: for the specification and for the backend."""

    def __init__(self, kind: str, generator: torch.Generator) -> None:
        self.generator = generator
        count = int(self._between(1, 2000))
        self.scale = 10 ** self._between(-4, 1)
        start = {
            "values": torch.randn(count, generator=generator) * 10 ** self._between(-3, 1),
            "exp_avgs": torch.randn(count, generator=generator) * self.scale * 0.3,
            "exp_avg_sqs": (torch.randn(count, generator=generator) * self.scale * 0.3) ** 2,
            "steps": torch.tensor(float(int(self._between(0, 1000)))),
        }
        start["max_exp_avg_sqs"] = start["exp_avg_sqs"] * (1 + torch.rand(count, generator=generator))
        start["originals"] = start["values"] + torch.randn(count, generator=generator) * 10 ** self._between(-4, 0)
        self.tensors = [{name: tensor.clone() for name, tensor in start.items()} for _ in range(2)]
        self.options = {
            "lr": 10 ** self._between(-5, -1),
            "beta1": self._between(0.5, 0.99),
            "beta2": self._between(0.9, 0.9999),
            "eps": 10 ** self._between(-10, -4),
        }
        if "decay" in kind:
            self.options["weight_decay"] = 10 ** self._between(-4, 0)
            self.options["decoupled_weight_decay"] = kind.startswith("decoupled")
        if kind == "anchor":
            self.options["anchor"] = 10 ** self._between(-4, 0)
        self.optional = {"amsgrad": ["max_exp_avg_sqs"], "anchor": ["originals"]}.get(kind, [])

    def _between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def step(self) -> Tensor:
        """One step of both; the larger of magnitude and update of every entry of the specification."""
        count = self.tensors[0]["values"].numel()
        grad = torch.randn(count, generator=self.generator) * self.scale
        before = self.tensors[0]["values"].clone()
        for backend, tensors in zip(("reference", "native"), self.tensors, strict=True):
            lists = {name: [tensors[name]] for name in ("exp_avgs", "exp_avg_sqs", "steps", "values", *self.optional)}
            with gk.use_backend(backend):
                gk.masked_adam_([None], [grad], **lists, **self.options)
        after = self.tensors[0]["values"]
        return torch.maximum(after.abs(), (after - before).abs())

    def distance(self, steps: int) -> float:
        """The largest distance of an entry after some steps, in ULP."""
        scale = torch.zeros(())
        for _ in range(steps):
            scale = torch.maximum(scale, self.step()) if steps > 1 else self.step()
        expected, found = (tensors["values"].double() for tensors in self.tensors)
        ulp = torch.exp2(torch.floor(torch.log2(scale.double().clamp(min=2.0**-126))) - 23)
        return float(((expected - found).abs() / ulp).max())


def search_adam(seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    distances: dict[tuple[str, int], list[float]] = defaultdict(list)
    with torch.no_grad():
        for steps, problems in LENGTHS.items():
            for number in tqdm(range(problems * len(KINDS)), desc=f"{steps} steps", leave=False):
                kind = KINDS[number % len(KINDS)]
                generator = torch.Generator().manual_seed(seed * 1_000_003 + steps * 10_007 + number)
                distances[kind, steps].append(Problem(kind, generator).distance(steps))
    for (kind, steps), found in distances.items():
        above = {f"above_{limit}": sum(each > limit for each in found) for limit in (2, 4)}
        rows.append({"kind": kind, "steps": steps, **_spread(found), **above, **_about(seed)})
    return rows


def search_weight_grad(seed: int) -> list[dict[str, object]]:
    found: dict[str, list[float]] = defaultdict(list)
    for number in tqdm(range(PRODUCTS), desc="weight gradients", leave=False):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

        def draw(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        tokens, rows, n = 2 ** draw(0, 15) + draw(0, 100), draw(1, 100), draw(1, 200)
        grad_output = torch.randn(tokens, rows, generator=generator) * 10.0 ** draw(-3, 3) + draw(0, 3)
        inputs = torch.randn(tokens, n, generator=generator) + draw(0, 3)
        cols = gk.topk_rows(torch.rand(rows, n, generator=generator), draw(1, n + 1))
        exact, dense, magnitudes = (
            product.double().gather(1, cols.long())
            for product in (
                grad_output.double().T @ inputs.double(),
                grad_output.T @ inputs,
                grad_output.double().abs().T @ inputs.double().abs(),
            )
        )
        allowed = (dense - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * magnitudes
        with gk.use_backend("native"):
            for strategy in STRATEGIES:
                grad = gk.selected_weight_grad(grad_output, inputs, cols, strategy=strategy).double()
                found[strategy].append(float(((grad - exact).abs() / allowed).max()))
    return [
        {"strategy": strategy, **_spread(each), "above_1": sum(one > 1 for one in each), **_about(seed)}
        for strategy, each in found.items()
    ]


def _spread(found: list[float]) -> dict[str, object]:
    found = sorted(found)
    return {
        "problems": len(found), "median": f"{found[len(found) // 2]:.2f}",
        "p99": f"{found[math.ceil(0.99 * len(found)) - 1]:.2f}", "largest": f"{found[-1]:.2f}",
    }  # fmt: skip


def _about(seed: int) -> dict[str, object]:
    return {"seed": seed, "simd": native.module().simd(), **machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    for path, rows in ((WEIGHT_GRAD, search_weight_grad(seed)), (ADAM, search_adam(seed))):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(*(f"{value!s:>16}" for value in row.values()))


if __name__ == "__main__":
    main()
