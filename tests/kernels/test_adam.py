"""masked_adam_: the specification against torch.optim.Adam, the backends against the specification."""

from __future__ import annotations

import itertools
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
            **options,
        )

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


@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT, Layout.BITS], ids=str)
def test_an_index_out_of_range_changes_nothing(fast, layout):
    if fast != "cpu" or cases.INTERPRETED:
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


def test_an_index_out_of_range_is_skipped_on_cuda(fast):
    if fast == "cpu" and not cases.INTERPRETED:
        pytest.skip("the CPU backends refuse it (previous test)")
    problem = Problem()
    cols = cases.random_cols(6, 40, 3)
    problem.add(torch.randn(6, 40), cols, Layout.COLS, (6, 3), compact=False, master=False)
    there = problem.to(fast)
    there.indices[0][2, 1] = 40
    there.step()
    with gk.use_backend("reference"):
        problem.step()
    changed = problem.weights[0].clone()
    changed[2, cols[2, 1]] = there.weights[0][2, cols[2, 1]].cpu()
    assert torch.allclose(there.weights[0].cpu(), changed)


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
        ({"exp_avgs": [torch.zeros(2, 1).bfloat16()]}, TypeError, "exp_avg must be float32"),
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
    with pytest.raises(error, match=message):
        gk.masked_adam_(**arguments)
