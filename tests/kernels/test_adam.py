"""masked_adam_: the specification against torch.optim.Adam, the backends against the specification."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout, reference
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
        """Rounds those weights without masters in another way than to nearest; returns itself."""
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
        """All that a step may write."""
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
        own = torch.Generator().manual_seed(len(self.weights))  # the limits of some tests are met with these gradients
        gap = torch.randn(nnz_shape, generator=own) * torch.where(number % 2 == 0, 0.02, 1.0) * (number % 3 > 0)
        self.originals.append(picked + gap.to(dtype))


def flat_indices(weight: Tensor, index: Tensor | None, layout: Layout) -> Tensor:
    rows = weight.shape[0] if weight.ndim else 1
    cols = weight.numel() // max(rows, 1)
    if layout == Layout.ALL:
        return torch.arange(weight.numel())
    if layout == Layout.FLAT:
        return index.long()
    if layout == Layout.COLS:
        return (torch.arange(rows).unsqueeze(1) * cols + index).view(-1)
    return reference.unpack_bits(index, cols).view(-1).nonzero().view(-1)


def masks(rows: int, cols: int, k: int = 3):
    """One mask of every layout for a [rows, cols] view, with the shape of its compact state."""
    columns = cases.random_cols(rows, cols, k)
    irregular = cases.random_mask(rows, cols, 0.2)
    flat = irregular.view(-1).nonzero().view(-1)
    yield Layout.ALL, None, (rows, cols)
    yield Layout.COLS, columns, tuple(columns.shape)
    yield Layout.BITS, reference.pack_bits(irregular), (int(irregular.sum()),)
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


# The specification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_specification_is_bit_equal_to_torch_adam_on_the_gathered_entries(dtype, options, amsgrad):
    options = {"lr": 0.01, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, **options}
    with gk.use_backend("reference"):
        for layout, index, nnz_shape in masks(37, 101):
            weight = torch.randn(37, 101, dtype=dtype)
            picked = flat_indices(weight, index, layout)
            twin = torch.nn.Parameter(weight.view(-1)[picked].view(nnz_shape).clone())
            arguments = dict(options)
            betas = (arguments.pop("beta1"), arguments.pop("beta2"))
            torch_adam = torch.optim.Adam([twin], betas=betas, amsgrad=amsgrad, foreach=False, fused=False, **arguments)
            problem = Problem()
            problem.add(weight.clone(), index, layout, nnz_shape, compact=False, master=False)
            for _ in range(10):
                problem.new_gradients()
                twin.grad = problem.grads[0].view(-1)[picked].view(nnz_shape).clone()
                torch_adam.step()
                problem.step(amsgrad=amsgrad, **options)
                assert torch.equal(problem.weights[0].view(-1)[picked].view(nnz_shape), twin)
            state = torch_adam.state[twin]
            assert torch.equal(problem.exp_avgs[0], state["exp_avg"])
            assert torch.equal(problem.exp_avg_sqs[0], state["exp_avg_sq"])
            if amsgrad:
                assert torch.equal(problem.max_exp_avg_sqs[0], state["max_exp_avg_sq"])
            frozen = torch.ones(weight.numel(), dtype=torch.bool)
            frozen[picked] = False
            assert cases.same_bits(problem.weights[0].view(-1)[frozen], weight.view(-1)[frozen])


def pull_of(anchor: dict, p: Tensor, original: Tensor) -> Tensor:
    """The term that an anchor adds to the loss."""
    gap = p - original
    return anchor["anchor"] * (gap.abs() if anchor.get("anchor_l1") else gap**2).sum()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("anchor", "exact"),
    [({"anchor": 0.1, "anchor_l1": True}, True), ({"anchor": 2**-4}, True), ({"anchor": 0.1}, False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_coupled_anchor_is_a_term_of_the_loss(dtype, anchor, exact, maximize, amsgrad):
    """Bit-equal to torch's Adam on the gradients of autograd, but for one rounding.

    Autograd rounds anchor * (2 * gap), then its sum with the gradient; the specification, like torch's weight decay,
    rounds once. Where the product is exact, for a sign or a power of two, there is nothing to round.
    """
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    with gk.use_backend("reference"):
        for layout, index, nnz_shape in masks(37, 101):
            problem = Problem()
            weight = torch.randn(37, 101, dtype=dtype)
            problem.add(weight.clone(), index, layout, nnz_shape, compact=False, master=False)
            picked = flat_indices(weight, index, layout)
            original = problem.originals[0].clone()
            twin = torch.nn.Parameter(weight.view(-1)[picked].view(nnz_shape).clone())
            adam = torch.optim.Adam([twin], lr=0.01, maximize=maximize, amsgrad=amsgrad, foreach=False, fused=False)
            for _ in range(10):
                problem.new_gradients()
                adam.zero_grad()
                loss = (problem.grads[0].view(-1)[picked].view(nnz_shape) * twin).sum()
                (loss + (-1 if maximize else 1) * pull_of(anchor, twin, original)).backward()
                adam.step()
                problem.step(amsgrad=amsgrad, maximize=maximize, **anchor)
                got = problem.weights[0].view(-1)[picked].view(nnz_shape)
                if exact:
                    assert torch.equal(got, twin)
                else:  # the rounding of a gradient near zero is all of a step's direction
                    torch.testing.assert_close(got, twin.detach(), rtol=0, atol=tolerance)
            assert torch.equal(problem.originals[0], original)
            frozen = torch.ones(weight.numel(), dtype=torch.bool)
            frozen[picked] = False
            assert cases.same_bits(problem.weights[0].view(-1)[frozen], weight.view(-1)[frozen])


DECAYS = [{"weight_decay": 0.0}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": True}]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_comes_before_the_anchor(decay, l1, decoupled, maximize):
    """Each step as it is written in the papers, in float64; Adam itself is torch's, without decay."""
    anchor, lr = 8.0, 0.01
    problem = Problem()
    problem.add(torch.randn(7, 9).double(), None, Layout.ALL, (7, 9), compact=False, master=False, earlier_steps=0)
    p, g, original = problem.weights[0].clone(), problem.grads[0].clone(), problem.originals[0].clone()
    g = -g if maximize else g
    if decay.get("decoupled_weight_decay"):
        p -= lr * decay["weight_decay"] * p
    else:
        g += decay["weight_decay"] * p
    gap = p - original
    if decoupled and l1:
        p = original + gap.sign() * (gap.abs() - lr * anchor).clamp(min=0)
        assert 0.1 < (p == original).double().mean() < 0.9
    elif decoupled:
        p -= 2 * lr * anchor * gap
    else:
        g += anchor * gap.sign() if l1 else 2 * anchor * gap
    twin = torch.nn.Parameter(p)
    twin.grad = g
    torch.optim.Adam([twin], lr=lr, foreach=False, fused=False).step()
    with gk.use_backend("reference"):
        problem.step(lr=lr, maximize=maximize, anchor=anchor, anchor_l1=l1, anchor_decoupled=decoupled, **decay)
    torch.testing.assert_close(problem.weights[0], twin.detach(), rtol=1e-13, atol=1e-14)


def step_without_gradient(device: str, p: list[float], original: list[float], **options) -> Tensor:
    """What an anchor alone makes of parameters: Adam adds nothing."""
    weight = torch.tensor(p, device=device)
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    gk.masked_adam_(
        [weight], zeros[:1], zeros[1:2], zeros[2:], [torch.zeros((), device=device)],
        originals=[torch.tensor(original, device=device)], **options,
    )  # fmt: skip
    return weight.cpu()


def test_a_decoupled_l1_anchor_stops_at_the_original(fast):
    original = [-0.0, 0.0, 1.0, -3e-39, 0.3, 1e9, -7.0]
    for p in ([0.3] * 7, [-2e4] * 7, original):
        got = step_without_gradient(fast, p, original, lr=0.1, anchor=1e12, anchor_l1=True, anchor_decoupled=True)
        assert cases.same_bits(got, torch.tensor(original))


@pytest.mark.parametrize("l1", [False, True])
def test_a_decoupled_anchor_moves_nothing_without_a_learning_rate(fast, l1):
    """original + (p - original) would: it rounds p to the last place of the original."""
    p = [1e-9, 1.1, -3.0]
    got = step_without_gradient(fast, p, [1.0, 1e7, 1e-9], lr=0.0, anchor=1.0, anchor_l1=l1, anchor_decoupled=True)
    assert torch.equal(got, torch.tensor(p))


def test_no_anchor_is_the_step_of_before(fast):
    problem = everything(torch.float32)
    for original in problem.originals:
        original.fill_(float("nan"))
    plain, there = problem.to(fast), problem.to(fast)
    plain.originals = None
    plain.step(weight_decay=0.1)
    there.step(weight_decay=0.1, anchor=0.0)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(getattr(plain, name), getattr(there, name), strict=True):
            assert cases.same_bits(a.cpu(), b.cpu())


# Gradient scaling, low-precision weights and moments ------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)
ROUNDINGS = ("stochastic", "compensated")
ZERO_WORD = 5795647, 56  # a seed and an entry whose random word in step 1 is 0, one in 2**32; found by inverting mix
EVERY_OPTION = OPTIONS + ANCHORS
SOME_OPTIONS = EVERY_OPTION[2::8] if cases.INTERPRETED else EVERY_OPTION


def check_same_bits(problem: Problem, fast: str, view=cases.contiguous, **options) -> None:
    """One step leaves the same bits as the specification's, everywhere; call it with the exact root."""
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


@pytest.fixture
def exact_root(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2] if cases.INTERPRETED else cases.DTYPES, ids=str)
def test_a_scaled_gradient_is_divided_first(fast, dtype, options):
    """By a power of two there is nothing to round: the bits are those of the unscaled gradient."""
    plain = everything(dtype, earlier_steps=3)
    scaled = plain.to("cpu")
    for grad in scaled.grads:
        grad *= 8
    plain, scaled = plain.to(fast), scaled.to(fast)
    plain.step(amsgrad=True, **options)
    scaled.step(amsgrad=True, grad_scale=torch.tensor([8.0], device=fast), **options)
    assert same_tensors(plain, scaled)
    assert torch.equal(scaled.grads[0].cpu(), 8 * plain.grads[0].cpu())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_division_is_rounded_once_in_the_dtype_of_the_state(fast, dtype):
    plain = everything(dtype, earlier_steps=3)
    scaled = plain.to(fast)
    scale = torch.tensor(3.7)
    for grad in plain.grads:
        grad.copy_(torch.from_numpy(grad.numpy() / scale.to(dtype).numpy()))
    plain = plain.to(fast)
    plain.step(weight_decay=0.1, anchor=0.1)
    scaled.step(weight_decay=0.1, anchor=0.1, grad_scale=scale.to(fast), found_inf=torch.zeros(1, device=fast))
    assert same_tensors(plain, scaled)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_narrow_gradient_is_divided_in_float32(fast, dtype, exact_root):
    problem = everything(dtype, earlier_steps=3).round("stochastic")
    check_same_bits(problem, fast, grad_scale=torch.tensor(3.7, device=fast))


def test_scaling_is_that_of_torchs_fused_adam(fast):
    """Which, too, is done in float32; torch fuses other products, hence the tolerance."""
    p, g = torch.randn(100), 1000 * torch.randn(100)
    twin = torch.nn.Parameter(p.clone())
    adam = torch.optim.Adam([twin], lr=0.01, eps=0.1, fused=True)  # without such an eps no scale matters
    zeros = [torch.zeros(100, device=fast) for _ in range(2)]
    weight, step = p.to(fast), torch.zeros((), device=fast)
    for found in (0.0, 1.0, 0.0):
        twin.grad, adam.grad_scale, adam.found_inf = g.clone(), torch.tensor(1000.0), torch.tensor(found)
        adam.step()
        scaler = {"grad_scale": adam.grad_scale.to(fast), "found_inf": adam.found_inf.to(fast)}
        gk.masked_adam_([weight], [g.to(fast)], zeros[:1], zeros[1:], [step], lr=0.01, eps=0.1, **scaler)
        torch.testing.assert_close(weight.cpu(), twin.detach(), rtol=1e-6, atol=1e-7)
    assert float(step) == float(adam.state[twin]["step"]) == 2


@pytest.mark.parametrize("found", [2.0, float("nan")] + [1.0, -0.5, float("inf")] * (not cases.INTERPRETED))
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_nothing_changes_where_infinities_were_found(fast, found, backend):
    device = fast if backend == "fast" else "cpu"
    for how in ROUNDINGS:
        problem = everything(torch.bfloat16, earlier_steps=3).round(how).to(device)
        before = problem.to("cpu")
        with gk.use_backend("reference") if backend == "reference" else nullcontext():
            problem.step(amsgrad=True, weight_decay=0.1, anchor=0.1, found_inf=torch.tensor(found, device=device))
        assert same_tensors(problem, before)


def test_a_step_is_done_where_no_infinity_was_found(fast):
    plain = everything(torch.float16, earlier_steps=3).round("compensated").to(fast)
    checked = plain.to(fast)
    plain.step()
    for zero in (0.0, -0.0):
        there = checked.to(fast)
        there.step(found_inf=torch.tensor([zero], device=fast))
        assert same_tensors(plain, there)


def test_a_scaler_of_another_shape_is_refused_in_every_call():
    """The native backend remembers that the tensors have been checked; these are not of them."""
    arguments = adam_arguments()
    gk.masked_adam_(**arguments, found_inf=torch.zeros(1))
    for name in ("found_inf", "grad_scale"):
        with pytest.raises(ValueError, match=f"{name} must be one float32"):
            gk.masked_adam_(**arguments, **{name: torch.zeros(2)})
    assert arguments["steps"][0] == 1


def set_weight(
    device: str, x: Tensor, dtype: torch.dtype, seed: int | None = None, *, step: int = 0,
    compensation: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Zeros after a step whose float32 result is x: without a gradient, an anchor pulls them all the way to x."""
    weight = torch.zeros(x.shape, dtype=dtype, device=device)
    zeros = [torch.zeros(x.shape, device=device) for _ in range(3)]
    gk.masked_adam_(
        [weight], zeros[:1], zeros[1:2], zeros[2:], [torch.tensor(float(step), device=device)],
        originals=[x.to(device)], anchor=0.5, anchor_decoupled=True, lr=1.0,
        seeds=[seed], compensations=[compensation],
    )  # fmt: skip
    return weight.cpu()


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of a dtype on both sides of x, towards and away from zero; infinity counts as the next number."""
    nearest = x.to(dtype)
    bits = nearest.view(torch.int16)
    below = torch.where(nearest.float().abs() > x.abs(), bits - 1, bits).view(dtype)
    above = torch.where(below.float() == x, below.view(torch.int16), below.view(torch.int16) + 1).view(dtype)
    return torch.copysign(below.double(), x), torch.copysign(above.double(), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_is_unbiased(fast, dtype):
    x = torch.tensor([1.0001, 1.007, 3.0e-5, 6.1e-5, 2.0e-6, 1.0e-7, 4.0e-8, 2.0e-8, 1e-9, 5e4, 3.3, 1.99999, 2e-39])
    x = torch.cat([x, -x])
    below, above = neighbours(x, dtype)
    copies, seeds = (200, 10) if cases.INTERPRETED else (40, 500)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for seed in range(seeds):
        got = set_weight(fast, x.repeat(copies), dtype, seed).view(copies, -1).double()
        assert ((got == below) | (got == above)).all()
        assert torch.equal(got.signbit(), x.signbit().expand_as(got))
        total += got.sum(0)
    samples = copies * seeds
    share = (x.double() - below) / (above - below)
    deviation = (above - below).abs() * (share * (1 - share) / samples).sqrt()
    # A share of 1e-30 never rises; and never is a part of 2**-32.
    limit = 5 * deviation + (above - below).abs() * torch.where(share < 1e-4, 5 / samples, 2.0**-32)
    assert ((total / samples - x.double()).abs() <= limit).all()


def awkward(count: int) -> Tensor:
    """float32 of every exponent and sign, infinities and NaN of any payload among them, and all near the limits."""
    bits = torch.randint(-(2**31), 2**31, (count,)).to(torch.int32)
    edges = [0.0, 2.0**-24, 2.0**-25, 2.0**-14, 2.0**-33, 2.0**-126, 65504.0, 65520.0, 65536.0, 3.3895314e38, 1.0]
    near = [np.nextafter(np.float32(x), np.float32(to)) for x in edges for to in (0.0, np.inf)]
    special = torch.tensor([*edges, *near, float("inf"), float("nan"), 3.4028235e38])
    within = torch.randn(count) * 10.0 ** torch.randint(-10, 6, (count,))  # what float16 holds
    full = torch.tensor([2**31 - 1, -1]).to(torch.int32).view(torch.float32)  # NaN that a carry would turn into zero
    return torch.cat([bits.view(torch.float32), special, -special, full, within])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_has_the_same_bits_in_every_backend(fast, dtype):
    x = awkward(5000 if cases.INTERPRETED else 100_000)
    for seed in (0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)):
        got = set_weight(fast, x, dtype, seed, step=6)
        with gk.use_backend("reference"):
            expected = set_weight("cpu", x, dtype, seed, step=6)
        assert torch.equal(got.isnan(), x.isnan())
        assert cases.same_bits(without_nan(got), without_nan(expected))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_leaves_what_needs_none(fast, dtype):
    every = torch.arange(-(2**15), 2**15, 5 if cases.INTERPRETED else 1).to(torch.int16).view(dtype)
    for seed in (0, 77):
        weight = every.to(fast)
        zeros = [torch.zeros(every.shape, device=fast) for _ in range(3)]
        step = torch.zeros((), device=fast)
        gk.masked_adam_([weight], zeros[:1], zeros[1:2], zeros[2:], [step], lr=1.0, seeds=[seed])
        got = weight.cpu()
        assert torch.equal(got.isnan(), every.isnan())
        assert cases.same_bits(got[~every.isnan()], every[~every.isnan()])


def test_stochastic_rounding_beyond_the_largest_number(fast):
    """Up to where the next number would be, it or infinity; from there on infinity; never NaN."""
    largest = torch.tensor([65504.0, 65505.0, 65519.9, 65530.0, 65535.9, 65536.0, 7e4, 3e38])
    for x in (largest, -largest):
        got = torch.stack(
            [set_weight(fast, x, torch.float16, seed) for seed in range(20 if cases.INTERPRETED else 60)]
        ).double()
        assert not got.isnan().any()
        assert ((got.abs() == 65504) | (got == x.sign() * float("inf"))).all()
        assert got[:, 0].isfinite().all()
        assert got[:, 5:].isinf().all()
        for column in (2, 3):
            assert 0 < got[:, column].isinf().sum() < len(got)
    huge = torch.full((2000,), 3.3961776e38)  # halfway between bfloat16's largest number and 2**128
    assert 800 < set_weight(fast, huge, torch.bfloat16, 1).isinf().sum() < 1200


def test_other_seeds_steps_and_entries_round_otherwise(fast):
    """Coins of p = 1/2: those of two keys agree in half of all entries, and so do neighbouring entries."""
    n = 4000
    half = torch.full((n,), 1 + 2.0**-8)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (-1, 0), (0, 2), (0, 2**20), (2**31, 0), (-(2**63), 0)]
    flips = [set_weight(fast, half, torch.bfloat16, seed, step=step).double() > 1 for seed, step in keys]
    again = set_weight(fast, half, torch.bfloat16, 1, step=1).double() > 1
    assert torch.equal(flips[3], again)
    limit = 5 * (n / 4) ** 0.5
    for a, b in itertools.combinations(flips, 2):
        assert abs(int((a == b).sum()) - n / 2) < limit
    for a in flips:
        assert abs(int(a.sum()) - n / 2) < limit
        for distance in (1, 2, 32, 512):
            assert abs(int((a[distance:] == a[:-distance]).sum()) - (n - distance) / 2) < limit


def test_random_words_beyond_32_bits_of_entries():
    """The specification of entries that no test can hold in memory; the number's upper half counts."""
    words = reference.random_words(5, 3, torch.tensor([7, 2**32 + 7, 2**33 + 7]))
    assert len(set(words.tolist())) == 3


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 12345])
def test_every_entry_has_its_share_of_random_words(seed):
    """Over 400 steps, none is always rounded in the same direction."""
    words = torch.stack([reference.random_words(seed, t, torch.arange(512)) for t in range(1, 401)])
    assert ((words >= 2**31).sum(0) - 200).abs().max() < 5.5 * 10
    assert ((words & 1).sum(0) - 200).abs().max() < 5.5 * 10


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_random_word_of_zero_moves_nothing_that_is_exact(fast, dtype):
    seed, entry = ZERO_WORD
    assert reference.random_words(seed, 1, torch.tensor([entry])) == 0
    got = set_weight(fast, torch.ones(entry + 1), dtype, seed)
    assert (got == 1).all()
    tiny = torch.full((entry + 1,), 2.0**-24)
    assert (set_weight(fast, tiny, dtype, seed) == tiny).all()


def test_random_bits_belong_to_an_entrys_number_in_mask_order(fast):
    """However the mask is written down, and however many threads there are."""
    rows, cols = (4, 300) if cases.INTERPRETED else (40, 3000)
    mask = cases.random_mask(rows, cols, 0.3)
    flat = mask.view(-1).nonzero().view(-1)
    x, weight = torch.randn(flat.numel()), torch.randn(rows, cols).bfloat16()
    found = []
    threads = torch.get_num_threads()
    for layout, index in ((Layout.BITS, reference.pack_bits(mask)), (Layout.FLAT, flat), (Layout.ALL, None)):
        torch.set_num_threads(1 if layout == Layout.FLAT else 3)
        whole = weight if index is not None else weight.view(-1)[flat]
        whole = whole.clone().to(fast)
        zeros = [torch.zeros(x.shape, device=fast) for _ in range(2)]
        gk.masked_adam_(
            [whole], [x.to(fast)], zeros[:1], zeros[1:], [torch.zeros((), device=fast)], lr=1e-3, seeds=[9],
            indices=[None if index is None else index.to(fast)], layouts=[layout],
        )  # fmt: skip
        found.append(whole.cpu() if index is None else whole.cpu().view(-1)[flat])
    torch.set_num_threads(threads)
    assert cases.same_bits(found[0], found[1])
    assert cases.same_bits(found[0], found[2])


@pytest.mark.parametrize("how", ROUNDINGS)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(fast, how):
    problem = everything(torch.bfloat16).round(how).to(fast)
    for step in range(3):
        if step == 1:
            resumed = problem.to("cpu").to(fast)
        if step >= 1:
            resumed.step(lr=1e-3)
        problem.step(lr=1e-3)
    assert same_tensors(problem, resumed)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_roundings_have_the_same_bits_in_every_backend(fast, dtype, how, options, exact_root):
    check_same_bits(everything(dtype, earlier_steps=3).round(how), fast, amsgrad=True, **options)


@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_roundings_of_strided_weights(fast, view, how, exact_root):
    check_same_bits(everything(torch.bfloat16).round(how), fast, view, weight_decay=0.1)


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_roundings_of_infinities_and_nans(fast, dtype, how, exact_root):
    problem = everything(dtype).round(how)
    for tensor in (*problem.grads, *problem.weights, *problem.originals):
        tensor.copy_(cases.special(tuple(tensor.shape)))
    check_same_bits(problem, fast, anchor=0.05)
    for compensation in problem.compensations:
        assert compensation is None or compensation.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_compensation_is_what_rounding_left_behind(fast, dtype):
    x = awkward(2000)
    left = torch.zeros(x.shape, dtype=dtype, device=fast)
    weight = set_weight(fast, x, dtype, compensation=left)
    assert torch.equal(without_nan(weight), without_nan(x.to(dtype)))
    assert torch.equal(left.cpu(), torch.where(weight.isfinite(), x - weight.float(), 0.0).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compensation_tracks_the_float32_run(fast, dtype):
    """Small steps in one direction: rounded to nearest most are lost, compensated nearly none."""
    steps, n = (12, 64) if cases.INTERPRETED else (1000, 64)
    start = (torch.randn(n) * 0.5 + torch.where(torch.rand(n) < 0.5, 1.0, -1.0)).to(dtype)
    kinds = {"exact": (start.float(), None, None), "nearest": (start, None, None), "stochastic": (start, 11, None)}
    kinds["compensated"] = (start, None, torch.zeros(n, dtype=dtype, device=fast))
    weights = {kind: weight.clone().to(fast) for kind, (weight, _, _) in kinds.items()}
    moments = {kind: [torch.zeros(n, device=fast) for _ in range(2)] for kind in kinds}
    counts = {kind: torch.zeros((), device=fast) for kind in kinds}
    for _ in range(steps):
        grad = (torch.randn(n) + 0.5).to(fast)
        for kind, (_, seed, compensation) in kinds.items():
            gk.masked_adam_(
                [weights[kind]], [grad], moments[kind][:1], moments[kind][1:], [counts[kind]], lr=1e-4,
                seeds=[seed], compensations=[compensation],
            )  # fmt: skip
    exact = weights["exact"].cpu().double()
    weights["compensated"] = weights["compensated"].double() + kinds["compensated"][2].double()
    errors = {kind: weight.cpu().double() - exact for kind, weight in weights.items()}
    moved = float((exact - start.double()).abs().mean())
    # Each step rounds the compensation, of at most half a unit of the weight, to half of its own last place.
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=2.0**-4) * 2
    own = (unit * torch.finfo(dtype).eps / 4).clamp(min=2.0**-25)
    assert (errors["compensated"].abs() <= steps * own).all()
    assert errors["compensated"].abs().mean() < 0.02 * moved
    if not cases.INTERPRETED:
        assert errors["nearest"].abs().mean() > 20 * errors["compensated"].abs().mean()
        # Each weight has but a few units to go: unbiased, if not exact.
        assert abs(float(errors["stochastic"].mean())) < 0.1 * moved


def test_a_weight_that_others_change_keeps_its_compensation(fast):
    weight, left = torch.ones(3, device=fast).bfloat16(), torch.full((3,), 2.0**-10, device=fast).bfloat16()
    zeros = [torch.zeros(3, device=fast) for _ in range(3)]
    arguments = ([weight], zeros[:1], zeros[1:2], zeros[2:], [torch.zeros((), device=fast)])
    for value in (1.0, 5.0, -3.0):
        weight.fill_(value)
        gk.masked_adam_(*arguments, lr=0.1, compensations=[left])
        assert weight.tolist() == [value] * 3
        assert left.tolist() == [2.0**-10] * 3


def test_other_seeds_and_compensations_are_seen(fast):
    """The native backend remembers the last call: not the seeds or compensations of another one."""
    x = torch.full((64,), 1 + 2.0**-8, device=fast)
    zeros = [torch.zeros(64, device=fast) for _ in range(3)]
    step = torch.zeros((), device=fast)
    weight = torch.zeros(64, device=fast).bfloat16()

    def step_with(**rounding) -> list[float]:
        step.zero_(), weight.zero_()
        gk.masked_adam_(
            [weight], zeros[:1], zeros[1:2], zeros[2:], [step], lr=1.0, originals=[x], anchor=0.5,
            anchor_decoupled=True, **rounding,
        )  # fmt: skip
        return weight.tolist()

    nearest, first, second = step_with(), step_with(seeds=[1]), step_with(seeds=[2])
    assert nearest == [1.0] * 64
    assert first != second
    assert nearest not in (first, second)
    assert step_with(seeds=[1]) == first
    assert step_with(seeds=[None]) == nearest
    assert step_with(seeds=[0]) not in (nearest, first)
    left, other = (torch.zeros(64, device=fast).bfloat16() for _ in range(2))
    for compensation in (left, other):
        assert step_with(compensations=[compensation]) == nearest
        assert compensation.tolist() == [2.0**-8] * 64
    left.zero_()
    assert step_with(compensations=[None]) == nearest
    assert left.tolist() == [0.0] * 64
    left.set_(torch.zeros(64, device=fast).bfloat16())
    assert step_with(compensations=[left]) == nearest
    assert left.tolist() == [2.0**-8] * 64


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES[1 if cases.INTERPRETED else 0 : 3], ids=str)
def test_moments_in_bfloat16_have_the_same_bits_in_every_backend(fast, dtype, options, exact_root):
    problem = everything(dtype, earlier_steps=3).halve_moments().round("stochastic")
    check_same_bits(problem, fast, amsgrad=True, grad_scale=torch.tensor(0.7, device=fast), **options)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_moments_in_bfloat16_are_rounded_when_they_are_stored(fast, backend, amsgrad):
    """The weight has the bits of a step with float32 moments; those then hold the same, rounded."""
    problem = everything(torch.float32, earlier_steps=3).halve_moments()
    whole = problem.to("cpu")
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        setattr(whole, name, [moment.float() for moment in getattr(whole, name)])
    device = fast if backend == "fast" else "cpu"
    problem, whole = problem.to(device), whole.to(device)
    with gk.use_backend("reference") if backend == "reference" else nullcontext():
        problem.step(amsgrad=amsgrad, weight_decay=0.1)
        whole.step(amsgrad=amsgrad, weight_decay=0.1)
    assert same_tensors(problem, whole.halve_moments())


# The backends ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS + ANCHORS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_step(fast, dtype, options, amsgrad):
    # A first step of 0.49999, just below a power of two, is where one ULP of torch's root weighs most: 3 ULP.
    limit = 3 if options.get("lr") == 0.5 else 2
    for earlier_steps in EARLIER_STEPS:
        check_step(everything(dtype, earlier_steps=earlier_steps), fast, cases.contiguous, amsgrad, options, limit)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", OPTIONS + ANCHORS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_step_is_bit_equal_but_for_the_root_of_torch(fast, dtype, options, amsgrad, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", exact_sqrt)
    for earlier_steps in EARLIER_STEPS:
        check_step(everything(dtype, earlier_steps=earlier_steps), fast, cases.contiguous, amsgrad, options, limit=0)


@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_strided_weights_and_gradients(fast, dtype, view):
    check_step(everything(dtype), fast, view, False, {"weight_decay": 0.1, "anchor": 0.05})


@pytest.mark.parametrize("grad_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradient_of_another_dtype(fast, dtype, grad_dtype):
    check_step(everything(dtype, grad_dtype), fast, cases.contiguous, False, {})


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (5, 0), (1, 33), (40, 1), (3, 2500)], ids=str)
def test_odd_shapes(fast, shape):
    options = {"weight_decay": 0.1, "anchor": 0.05}
    check_step(everything(torch.float32, shape=shape), fast, cases.contiguous, True, options)


def test_tensors_of_other_ranks(fast):
    """Convolutions are contiguous [out, ...]; biases are 1-D, scalars 0-D; neither needs a view."""
    problem = Problem()
    conv = torch.randn(6, 4, 3, 3)
    for layout, index, nnz_shape in masks(6, 36):
        shape = (6, 4, 3, 3) if layout == Layout.ALL else nnz_shape
        problem.add(conv.clone(), index, layout, shape, compact=False, master=False)
    problem.add(torch.randn(50), None, Layout.ALL, (50,), compact=False, master=True)
    problem.add(torch.randn(()), None, Layout.ALL, (), compact=False, master=False)
    problem.add(torch.randn(2, 3, 4).bfloat16(), None, Layout.ALL, (2, 3, 4), compact=False, master=True)
    check_step(problem, fast, cases.contiguous, True, {"weight_decay": 0.1, "anchor": 0.05})


def test_an_anchor_without_originals():
    p, m, v, step = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
    with pytest.raises(ValueError, match=r"anchor=0\.1 needs originals, the values to pull towards"):
        gk.masked_adam_([p], [torch.ones(3)], [m], [v], [step], lr=0.1, anchor=0.1)
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert step == 0


def test_values_without_a_weight(fast):
    values = torch.randn(5, 3)
    problem = Problem()
    problem.add(values.clone(), None, Layout.ALL, (5, 3), compact=True, master=False)
    alone = problem.to(fast)
    alone.values, alone.weights = alone.weights, [None]
    alone.step(anchor=0.05)
    with gk.use_backend("reference"):
        problem.step(anchor=0.05)
    assert ulps(alone.values[0], problem.weights[0], problem.weights[0].abs().clamp(min=0.01)) <= 2


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4] + ANCHORS[::4], ids=str)
def test_a_hundred_steps_with_state_carried(fast, dtype, options):
    problem = Problem()
    for layout, index, nnz_shape in masks(13, 45):
        problem.add(torch.randn(13, 45, dtype=dtype), index, layout, nnz_shape, compact=False, master=False)
    there = problem.to(fast)
    largest = [weight.abs() for weight in problem.weights]
    for _ in range(20 if cases.INTERPRETED else 100):
        problem.new_gradients()
        for mine, theirs in zip(problem.grads, there.grads, strict=True):
            theirs.copy_(mine)
        there.step(**options)
        with gk.use_backend("reference"):
            problem.step(**options)
        largest = [torch.maximum(a, w.abs()) for a, w in zip(largest, problem.weights, strict=True)]
    for got, expected, scale in zip(there.weights, problem.weights, largest, strict=True):
        assert ulps(got, expected, scale) <= 4


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, *ANCHORS], ids=str)
def test_infinities_and_nans_stay_in_selected_entries(fast, options):
    problem = everything(torch.float32)
    for tensor in (*problem.grads, *problem.originals):
        tensor.copy_(cases.special(tuple(tensor.shape)))
    before = problem.to("cpu")
    there = problem.to(fast)
    there.step(amsgrad=True, **options)
    with gk.use_backend("reference"):
        problem.step(amsgrad=True, **options)
    for i, (got, expected) in enumerate(zip(there.weights, problem.weights, strict=True)):
        assert torch.allclose(got.cpu(), expected, equal_nan=True)
        frozen = torch.ones(expected.numel(), dtype=torch.bool)
        frozen[flat_indices(expected, problem.indices[i], problem.layouts[i])] = False
        assert cases.same_bits(got.cpu().view(-1)[frozen], before.weights[i].view(-1)[frozen])
        assert torch.equal(there.max_exp_avg_sqs[i].cpu().isnan(), problem.max_exp_avg_sqs[i].isnan())


def test_the_same_bits_on_every_run(fast):
    first, second = everything(torch.bfloat16, earlier_steps=3), None
    second = first.to(fast)
    first = first.to(fast)
    first.step(), second.step()
    for a, b in zip(first.weights, second.weights, strict=True):
        assert cases.same_bits(a.cpu(), b.cpu())


def test_versions_are_bumped(fast):
    problem = everything(torch.float32).to(fast)
    problem.weights[0].requires_grad_()
    saved = (problem.weights[0] ** 2).sum()
    with torch.no_grad():
        problem.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_step_counts_for_one_tensor(fast):
    """On GPUs tensors are updated at the same time, and none would know which of them counts first."""
    weights = [torch.ones(2, 3, device=fast) for _ in range(2)]
    moments = [[torch.zeros(2, 3, device=fast) for _ in weights] for _ in range(2)]
    with pytest.raises(ValueError, match="two tensors have the same step; each counts its own"):
        gk.masked_adam_(weights, weights, *moments, [torch.zeros((), device=fast)] * 2, lr=0.1)
    assert all((weight == 1).all() for weight in weights)


@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT, Layout.BITS], ids=str)
def test_an_index_out_of_range_changes_nothing(fast, layout):
    if fast != "cpu" or cases.FOR_GPUS:
        pytest.skip("CUDA kernels trust their indices and skip what is out of range (next test)")
    for backend in ("reference", "native"):
        problem = everything(torch.float32)
        bad = max(i for i, this in enumerate(problem.layouts) if this == layout)
        problem.indices[bad].view(-1)[-1] = -1  # for BITS: all of the last word, spare bits included
        before = problem.to("cpu")
        with gk.use_backend(backend), pytest.raises((IndexError, ValueError), match=f"tensor {bad}: indices "):
            problem.step()
        for name in ("weights", "values", "exp_avgs", "exp_avg_sqs", "steps"):
            for now, then in zip(getattr(problem, name), getattr(before, name), strict=True):
                assert now is None or torch.equal(now, then)


@pytest.mark.parametrize("bad", [-1, 40, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT], ids=str)
def test_an_index_out_of_range_is_skipped_on_cuda(fast, layout, bad):
    if fast == "cpu" and not cases.FOR_GPUS:
        pytest.skip("the CPU backends refuse it (previous test)")
    problem = Problem()
    index = cases.random_cols(6, 40, 3)
    if layout == Layout.FLAT:
        index = (torch.arange(6, dtype=torch.int32).unsqueeze(1) * 40 + index).view(-1)
        bad = 240 if bad == 40 else bad
    problem.add(torch.randn(6, 40), index, layout, tuple(index.shape), compact=False, master=False)
    there = problem.to(fast)
    there.indices[0].view(-1)[7] = bad
    there.step()
    with gk.use_backend("reference"):
        problem.step()
    changed = problem.weights[0].clone()
    at = 2, int(index.view(-1)[7]) % 40
    changed[at] = there.weights[0][at].cpu()
    assert torch.allclose(there.weights[0].cpu(), changed)
    assert there.exp_avgs[0].view(-1)[7] == 0  # neither its weight nor its state


def test_wrong_bit_count(fast):
    if fast != "cpu" or cases.INTERPRETED:
        pytest.skip("counting would synchronise a CUDA device")
    problem = Problem()
    mask = cases.random_mask(4, 40)
    mask[0, 0] = True
    nnz = int(mask.sum())
    problem.add(torch.randn(4, 40), reference.pack_bits(mask), Layout.BITS, (nnz,), compact=False, master=False)
    problem.indices[0][0, 0] -= 1
    for backend in ("reference", "native"):
        with gk.use_backend(backend), pytest.raises(ValueError, match=f"has {nnz - 1} bits set, but exp_avg has {nnz}"):
            problem.step()


def test_tensors_resized_between_steps_are_seen():
    """The native backend remembers the last call; what has changed in place must not be what it remembers."""
    weight, grad = torch.zeros(100), torch.ones(100)
    index = torch.arange(64, dtype=torch.int32)
    exp_avg, exp_avg_sq, step = torch.zeros(64), torch.zeros(64), torch.zeros(())
    arguments = {"indices": [index], "layouts": [Layout.FLAT], "lr": 0.1}
    gk.masked_adam_([weight], [grad], [exp_avg], [exp_avg_sq], [step], **arguments)
    for tensor in (index, exp_avg, exp_avg_sq):
        tensor.resize_(8)
    before = weight.clone()
    gk.masked_adam_([weight], [grad], [exp_avg], [exp_avg_sq], [step], **arguments)
    assert (weight != before).nonzero().view(-1).tolist() == list(range(8))
    gk.masked_adam_([weight], [torch.full((100,), -1.0)], [exp_avg], [exp_avg_sq], [step], **arguments)
    with pytest.raises(ValueError, match="grad must be dense"):
        gk.masked_adam_([weight], [torch.ones(99)], [exp_avg], [exp_avg_sq], [step], **arguments)


def test_other_originals_are_seen(fast):
    """The native backend remembers the last call: not the originals of another one, nor maxima for originals."""
    weight, *state = [torch.zeros(4, device=fast) for _ in range(5)]
    grad, exp_avg, exp_avg_sq, maxima = state
    step = torch.zeros((), device=fast)

    def step_to(**optional) -> float:
        gk.masked_adam_(
            [weight], [grad], [exp_avg], [exp_avg_sq], [step], lr=1.0,
            anchor=1e6 * ("originals" in optional), anchor_l1=True, anchor_decoupled=True, **optional,
        )  # fmt: skip
        return weight[0].item()

    assert step_to(max_exp_avg_sqs=[maxima]) == 0
    maxima.fill_(3.0)
    assert step_to(originals=[maxima]) == 3
    assert step_to(originals=[torch.full((4,), 5.0, device=fast)]) == 5
    assert step_to(originals=[maxima]) == 3
    maxima.set_(torch.full((4,), 7.0, device=fast))
    assert step_to(originals=[maxima]) == 7
    assert step_to(max_exp_avg_sqs=[maxima]) == 7
    with pytest.raises(ValueError, match="original must match exp_avg"):
        step_to(originals=[torch.zeros(3, device=fast)])


def test_a_negative_index_is_out_of_range_of_any_tensor():
    """As an unsigned number -1 is below the 4.9e9 entries of this overlapping view."""
    base = torch.zeros(150_000)
    weight = base.as_strided((70_000, 70_000), (1, 1), 10)
    state = [torch.zeros(1), torch.zeros(1), torch.zeros(())]
    index = torch.tensor([-1], dtype=torch.int32)
    for backend in ("reference", "native"):
        with gk.use_backend(backend), pytest.raises(IndexError, match="found -1"):
            gk.masked_adam_(
                [weight], [torch.ones(1)], state[:1], state[1:2], state[2:],
                indices=[index], layouts=[Layout.FLAT], lr=0.1,
            )  # fmt: skip
    assert not base.any()


def test_tensors_that_require_grad_need_no_grad():
    weight = torch.ones(2, 3, requires_grad=True)
    state = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(())]
    with pytest.raises(RuntimeError, match=r"call it under torch\.no_grad"):
        gk.masked_adam_([weight], [torch.ones(2, 3)], state[:1], state[1:2], state[2:], lr=0.1)


def test_no_tensors():
    gk.masked_adam_([], [], [], [], [], lr=0.1)


HALF_WEIGHT = {"weights": [torch.ones(2, 3).half()]}
COMPENSATED = {**HALF_WEIGHT, "compensations": [torch.zeros(2, 1).half()]}
BF16_MOMENTS = {"exp_avgs": [torch.zeros(2, 1).bfloat16()], "exp_avg_sqs": [torch.zeros(2, 1).bfloat16()]}


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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads has 0 entries, but weights has 1"),
        ({"values": [torch.ones(2, 1)] * 2}, ValueError, "values has 2 entries"),
        ({"grads": [torch.ones(3, 2)]}, ValueError, r"tensor 0: grad must be dense .*weight \[2, 3\]"),
        ({"grads": [torch.ones(2, 3).to_sparse()]}, TypeError, "does not support sparse gradients"),
        ({"grads": [torch.ones(2, 3, dtype=torch.complex64)]}, TypeError, "complex tensors are not supported"),
        ({"grads": [torch.ones(2, 3, device="meta")]}, ValueError, "grad is on meta"),
        ({"exp_avgs": [torch.zeros(2, 1).half()]}, TypeError, "exp_avg must be float32 or bfloat16"),
        ({"exp_avgs": [torch.zeros(2, 1).bfloat16()]}, ValueError, "exp_avg_sq must match exp_avg .torch.bfloat16"),
        ({**BF16_MOMENTS, "values": [torch.ones(2, 1).bfloat16()]}, ValueError, "values must match .*torch.float32"),
        ({**BF16_MOMENTS, "originals": [torch.ones(2, 1).bfloat16()]}, ValueError, "original must match .*float32"),
        ({**BF16_MOMENTS, "weights": [torch.ones(2, 3).double()]}, TypeError, "a state of torch.bfloat16 cannot train"),
        ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale must be one float32 on cpu, got torch.float32 \[2\]"),
        ({"grad_scale": torch.ones(1).double()}, ValueError, "grad_scale must be one float32 .*float64"),
        ({"found_inf": torch.ones(1).bool()}, ValueError, "found_inf must be one float32 .*bool"),
        ({"found_inf": torch.ones((), device="meta")}, ValueError, "found_inf must be one float32 on cpu, .* on meta"),
        ({"seeds": [1, 2]}, ValueError, "seeds has 2 entries"),
        ({**HALF_WEIGHT, "seeds": [2**63]}, ValueError, "tensor 0: seed must be an int64, .*got 9223372036854775808"),
        ({"seeds": [1]}, TypeError, "tensor 0: a seed needs a bfloat16 or float16 weight, got torch.float32"),
        ({"compensations": [torch.zeros(2, 1)]}, TypeError, "0: a compensation needs .* weight, got torch.float32"),
        ({**HALF_WEIGHT, "seeds": [1], "values": [torch.ones(2, 1)]}, ValueError, "a seed is for a weight without val"),
        ({**COMPENSATED, "values": [torch.ones(2, 1)]}, ValueError, "a compensation is for a weight without values"),
        ({**COMPENSATED, "seeds": [1]}, ValueError, "tensor 0: it has a seed and a compensation"),
        ({**COMPENSATED, "compensations": [torch.zeros(2, 1)]}, ValueError, "compensation must match .*torch.float16"),
        ({**COMPENSATED, "compensations": [torch.zeros(2).half()]}, ValueError, r"compensation must match .*\[2, 1\]"),
        ({**COMPENSATED, "compensations": [None, None]}, ValueError, "compensations has 2 entries"),
        (
            {**HALF_WEIGHT, "compensations": [torch.zeros(2, 2).half()[:, :1]]},
            ValueError,
            "compensation must be contiguous",
        ),
        (
            {"weights": [None], "values": [torch.ones(2, 1)], "grads": [torch.ones(2, 1)], "seeds": [1]},
            ValueError,
            "a seed needs a weight to round, got none",
        ),
        (
            {**HALF_WEIGHT, "seeds": [1], "exp_avgs": [torch.zeros(2, 1).double()],
             "exp_avg_sqs": [torch.zeros(2, 1).double()]},
            TypeError,
            "a seed needs moments in float32 or bfloat16, got torch.float64",
        ),
        ({"exp_avg_sqs": [torch.zeros(2, 2)]}, ValueError, "exp_avg_sq must match exp_avg"),
        ({"values": [torch.zeros(2, 1).half()]}, ValueError, "values must match exp_avg"),
        ({"originals": [torch.ones(2, 1)] * 2}, ValueError, "originals has 2 entries"),
        ({"originals": [torch.ones(2, 1).bfloat16()]}, ValueError, "original must match exp_avg"),
        ({"originals": [torch.ones(2, 2)[:, :1]]}, ValueError, "original must be contiguous"),
        ({"originals": [torch.ones(2, 1, device="meta")]}, ValueError, "original is on meta"),
        ({"indices": [torch.zeros(2, 2, dtype=torch.int32)]}, ValueError, r"shape of exp_avg \[2, 1\]"),
        ({"exp_avgs": []}, ValueError, "exp_avgs has 0 entries"),
        ({"indices": [torch.zeros(2, 1, dtype=torch.int32, device="meta")]}, ValueError, "indices is on meta"),
        ({"indices": [torch.zeros(2, 1)]}, ValueError, r"indices must be int32 \[rows, k\]"),
        ({"layouts": [9]}, ValueError, "unknown layout 9"),
        ({"layouts": [Layout.FLAT], "indices": [torch.zeros(3, dtype=torch.int32)]}, ValueError, "indices must be 2"),
        ({"layouts": [Layout.BITS], "indices": [torch.zeros(2, 4, dtype=torch.int32)]}, ValueError, "4 words a row"),
        ({"weights": [torch.ones(3, 3)]}, ValueError, "the mask is for 2 rows"),
        ({"weights": [torch.ones(2, 3).double()]}, TypeError, "which a state of torch.float32 cannot train"),
        ({"weights": [torch.ones(1, 3).expand(2, 3)]}, ValueError, "stride 0"),
        ({"weights": [None]}, ValueError, "neither values nor a weight"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, ValueError, "step must be one float"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = adam_arguments(**changes)
    lists = [given for given in arguments.values() if isinstance(given, list)]
    before = [given.clone() for tensors in lists for given in tensors if isinstance(given, Tensor)]
    with pytest.raises(error, match=message):
        gk.masked_adam_(**arguments)
    after = [given for tensors in lists for given in tensors if isinstance(given, Tensor)]
    assert all(a.device.type == "meta" or a.is_sparse or torch.equal(a, b) for a, b in zip(after, before, strict=True))
