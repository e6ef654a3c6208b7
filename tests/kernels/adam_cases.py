"""Problems for masked_adam_ in every layout and dtype, its options, and comparisons with the specification."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.kernels import cases

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True, "weight_decay": 0.01},
    {"beta1": 0.3, "beta2": 0.9, "eps": 1e-3, "lr": 0.5},  # 1 - beta1 >= 0.5 takes lerp's other form
    {"beta1": 0.0, "beta2": 0.0},
]
ANCHORS = [  # every kind, with every kind of weight decay
    {"anchor": 0.05},
    {"anchor": 0.05, "maximize": True, "weight_decay": 0.1},
    {"anchor": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 0.05, "anchor_l1": True, "maximize": True},
    {"anchor": 10.0, "anchor_decoupled": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 5.0, "anchor_decoupled": True, "anchor_l1": True, "weight_decay": 0.1},
]
FLOAT_DTYPES = (torch.float32, torch.float64)
EARLIER_STEPS = (3,) if cases.INTERPRETED else (0, 7)


@dataclass
class Problem:
    """The lists that one call of masked_adam_ takes."""

    weights: list[Tensor | None] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    indices: list[Tensor | None] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    originals: list[Tensor] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    compensations: list[Tensor | None] = field(default_factory=list)

    def to(self, device: str, view=lambda t: t) -> Problem:
        """A copy on another device; ``view`` restrides the dense tensors."""
        copy = Problem()
        for name, tensors in vars(self).items():
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    tensor = tensor.clone().to(device)
                    if name in ("weights", "grads") and tensor.ndim == 2:
                        tensor = view(tensor)
                getattr(copy, name).append(tensor)
        for i, (grad, state) in enumerate(zip(copy.grads, copy.exp_avgs, strict=True)):
            if grad.shape == state.shape and copy.layouts[i] != Layout.ALL:
                copy.grads[i] = grad.contiguous()
        return copy

    def step(self, amsgrad=False, **options) -> None:
        options = {"lr": 0.01, **options}
        gk.masked_adam_(
            self.weights,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            indices=self.indices,
            layouts=self.layouts,
            values=self.values,
            max_exp_avg_sqs=self.max_exp_avg_sqs if amsgrad else None,
            originals=self.originals if "anchor" in options else None,
            seeds=self.seeds or None,
            compensations=self.compensations or None,
            **options,
        )

    def round(self, how: str) -> Problem:
        """Sets how weights without masters are rounded, if not to nearest; returns itself."""
        for i, (weight, state) in enumerate(zip(self.weights, self.exp_avgs, strict=True)):
            alone = self.values[i] is None and weight.dtype not in FLOAT_DTYPES
            self.seeds.append((-3) ** i * 1234567890123 if alone and how == "stochastic" else None)
            left = 1e-3 * torch.randn(state.shape)
            self.compensations.append(left.to(weight.dtype) if alone and how == "compensated" else None)
        return self

    def halve_moments(self) -> Problem:
        for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            setattr(self, name, [moment.bfloat16() for moment in getattr(self, name)])
        return self

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step may write."""
        names = ("weights", "values", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "compensations")
        return [tensor.cpu() for name in names for tensor in getattr(self, name) if tensor is not None]

    def new_gradients(self) -> None:
        for grad in self.grads:
            grad.copy_(torch.randn(grad.shape, dtype=torch.float64))

    def add(self, weight, index, layout, nnz_shape, *, compact, master, grad_dtype=None, earlier_steps=0):
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        self.weights.append(weight)
        shape = nnz_shape if compact else tuple(weight.shape)
        self.grads.append(torch.randn(shape, dtype=torch.float64).to(grad_dtype or weight.dtype))
        moments = torch.randn((3, *nnz_shape), dtype=torch.float64) * (earlier_steps > 0)
        self.exp_avgs.append((0.1 * moments[0]).to(dtype))
        self.exp_avg_sqs.append((0.1 * moments[1].square()).to(dtype))
        self.max_exp_avg_sqs.append((0.1 * moments[2].square()).to(dtype))
        self.steps.append(torch.tensor(float(earlier_steps)))
        self.indices.append(index)
        self.layouts.append(layout)
        picked = weight.reshape(-1)[flat_indices(weight, index, layout)].to(dtype).view(nnz_shape)
        self.values.append(picked if master else None)
        # Every other entry lies within reach of an L1 step, and every third one on its original.
        number = torch.arange(picked.numel()).view(nnz_shape)
        own = torch.Generator().manual_seed(len(self.weights))  # some tests hold their limits for these draws
        gap = torch.randn(nnz_shape, generator=own) * torch.where(number % 2 == 0, 0.02, 1.0) * (number % 3 > 0)
        self.originals.append(picked + gap.to(dtype))


def flat_indices(weight: Tensor, index: Tensor | None, layout: Layout) -> Tensor:
    rows = weight.shape[0] if weight.ndim else 1
    cols = weight.numel() // max(rows, 1)
    if layout == Layout.ALL:
        return torch.arange(weight.numel())
    if layout == Layout.FLAT:
        return index.long()
    return (torch.arange(rows).unsqueeze(1) * cols + index).view(-1)


def masks(rows: int, cols: int, k: int = 3):
    """One mask of every layout for a [rows, cols] view, with the shape of its compact state."""
    columns = cases.random_cols(rows, cols, k)
    irregular = cases.random_mask(rows, cols, 0.2)
    flat = irregular.view(-1).nonzero().view(-1)
    yield Layout.ALL, None, (rows, cols)
    yield Layout.COLS, columns, tuple(columns.shape)
    yield Layout.FLAT, flat.to(torch.int32), (flat.numel(),)
    yield Layout.FLAT, flat[torch.randperm(flat.numel())], (flat.numel(),)  # int64, any order


def everything(dtype, grad_dtype=None, shape=(4, 45) if cases.INTERPRETED else (13, 45), earlier_steps=0) -> Problem:
    """Tensors of every layout, dense and compact gradients, with and without masters, in one problem."""
    problem = Problem()
    both = itertools.product((False, True), (False, True)) if not cases.INTERPRETED else ((False, False), (True, True))
    for compact, master in both:
        for layout, index, nnz_shape in masks(*shape):
            weight = torch.randn(shape, dtype=torch.float64).to(dtype)
            problem.add(
                weight,
                index,
                layout,
                nnz_shape,
                compact=compact,
                master=master,
                grad_dtype=grad_dtype,
                earlier_steps=earlier_steps,
            )
    return problem


def ulps(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Largest distance in units of the last place of ``scale``; NaN must meet NaN."""
    if not actual.numel():
        return 0.0
    info = torch.finfo(expected.dtype)
    actual, expected, scale = actual.cpu().double(), expected.double(), scale.double().abs()
    assert torch.equal(actual.isnan(), expected.isnan())
    unit = info.eps * 2.0 ** scale.clamp(min=info.tiny).log2().floor()
    return float(((actual - expected).abs() / unit).nan_to_num(0.0).max())


HALVES = (torch.bfloat16, torch.float16)
ROUNDINGS = ("stochastic", "compensated")
ZERO_WORD = 5795647, 56  # a seed and an entry whose random word in step 1 is 0 (one in 2**32), found by inverting mix
EVERY_OPTION = OPTIONS + ANCHORS
SOME_OPTIONS = EVERY_OPTION[2::8] if cases.INTERPRETED else EVERY_OPTION


def check_same_bits(problem: Problem, fast: str, view=cases.contiguous, **options) -> None:
    """One step leaves the specification's bits everywhere; needs the fixture exact_root."""
    there = problem.to(fast, view)
    there.step(**options)
    with gk.use_backend("reference"):
        problem.step(**options)
    for got, expected in zip(there.tensors(), problem.tensors(), strict=True):
        # The payload of a NaN is not specified.
        assert torch.equal(got.isnan(), expected.isnan())
        assert cases.same_bits(without_nan(got), without_nan(expected))


def without_nan(tensor: Tensor) -> Tensor:
    return tensor.masked_fill(tensor.isnan(), 0.0)


def same_tensors(left: Problem, right: Problem) -> bool:
    return all(cases.same_bits(a, b) for a, b in zip(left.tensors(), right.tensors(), strict=True))


def set_weight(
    device: str, x: Tensor, dtype: torch.dtype, seed: int | None = None, *, step: int = 0,
    compensation: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Zeros after a step with the float32 result x: without a gradient, an anchor pulls them all the way to x."""
    weight = torch.zeros(x.shape, dtype=dtype, device=device)
    zeros = [torch.zeros(x.shape, device=device) for _ in range(3)]
    gk.masked_adam_(
        [weight], zeros[:1], zeros[1:2], zeros[2:], [torch.tensor(float(step), device=device)],
        originals=[x.to(device)], anchor=0.5, anchor_decoupled=True, lr=1.0,
        seeds=[seed], compensations=[compensation],
    )  # fmt: skip
    return weight.cpu()


def exact_sqrt(tensor: Tensor) -> Tensor:
    """The correctly rounded square root. torch's own, on the CPU, errs by up to 0.75 units of the last place."""
    return torch.from_numpy(np.sqrt(tensor.numpy()))


def check_step(problem: Problem, fast: str, view, amsgrad: bool, options: dict, limit: float = 2) -> None:
    """One step from the same state: within ``limit`` ULP everywhere, frozen entries to the bit."""
    before = problem.to("cpu")
    there = problem.to(fast, view)
    there.step(amsgrad=amsgrad, **options)
    with gk.use_backend("reference"):
        problem.step(amsgrad=amsgrad, **options)
    for i, weight in enumerate(problem.weights):
        picked = flat_indices(weight, problem.indices[i], problem.layouts[i])
        frozen = torch.ones(weight.numel(), dtype=torch.bool)
        frozen[picked] = False
        got = there.weights[i].cpu().reshape(-1)
        assert cases.same_bits(got[frozen], before.weights[i].reshape(-1)[frozen])
        old, new = before.weights[i].reshape(-1)[picked].double(), weight.reshape(-1)[picked].double()
        scale = torch.maximum(new.abs(), (new - old).abs())
        if weight.dtype in FLOAT_DTYPES:
            new, scale = new.to(weight.dtype), scale.to(weight.dtype)
            assert ulps(got[picked], new, scale) <= limit
        else:  # the float32 results may lie on two sides of a rounding boundary
            assert torch.allclose(got[picked].double(), new, rtol=2.0 ** -(7 if weight.dtype is torch.bfloat16 else 10))
        if problem.values[i] is not None:
            expected = problem.values[i]
            assert ulps(there.values[i], expected, torch.maximum(expected.abs(), scale.view(expected.shape))) <= limit
            assert cases.same_bits(got[picked], there.values[i].cpu().reshape(-1).to(weight.dtype))
        for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            moment, expected = getattr(there, name)[i], getattr(problem, name)[i]
            assert ulps(moment, expected, expected) <= min(limit, 2)
        assert float(there.steps[i]) == float(problem.steps[i]) == float(before.steps[i]) + 1


def adam_arguments(**changes):
    cols = torch.zeros(2, 1, dtype=torch.int32)
    arguments = {
        "weights": [torch.ones(2, 3)],
        "grads": [torch.ones(2, 3)],
        "exp_avgs": [torch.zeros(2, 1)],
        "exp_avg_sqs": [torch.zeros(2, 1)],
        "steps": [torch.zeros(())],
        "indices": [cols],
        "layouts": [Layout.COLS],
        "lr": 0.1,
    }
    return {**arguments, **changes}
