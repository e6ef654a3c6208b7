"""masked_adam_ on 16-bit weights, by stochastic rounding and compensation, and with moments in bfloat16."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout, reference
from tests.kernels import cases
from tests.kernels.adam_cases import (
    HALVES,
    ROUNDINGS,
    SOME_OPTIONS,
    ZERO_WORD,
    check_same_bits,
    everything,
    same_tensors,
    set_weight,
    without_nan,
)


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
    # A share of 1e-30 never rounds up, as random words resolve shares of 2**-32.
    limit = 5 * deviation + (above - below).abs() * torch.where(share < 1e-4, 5 / samples, 2.0**-32)
    assert ((total / samples - x.double()).abs() <= limit).all()


def awkward(count: int) -> Tensor:
    """float32 of every exponent and sign, with infinities, NaN of any payload, and numbers near the limits."""
    bits = torch.randint(-(2**31), 2**31, (count,)).to(torch.int32)
    edges = [0.0, 2.0**-24, 2.0**-25, 2.0**-14, 2.0**-33, 2.0**-126, 65504.0, 65520.0, 65536.0, 3.3895314e38, 1.0]
    near = [np.nextafter(np.float32(x), np.float32(to)) for x in edges for to in (0.0, np.inf)]
    special = torch.tensor([*edges, *near, float("inf"), float("nan"), 3.4028235e38])
    within = torch.randn(count) * 10.0 ** torch.randint(-10, 6, (count,))  # within the range of float16
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
    """Below the number that would come next: the largest number or infinity; from there on infinity; never NaN."""
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
    """Coin tosses with p = 1/2: two keys agree in half of all entries, and so do neighbouring entries."""
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
    """The specification for entries that no test can hold in memory: the upper half of their number counts."""
    words = reference.random_words(5, 3, torch.tensor([7, 2**32 + 7, 2**33 + 7]))
    assert len(set(words.tolist())) == 3


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 12345])
def test_every_entry_has_its_share_of_random_words(seed):
    """Over 400 steps, no entry is always rounded in the same direction."""
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
    """With and without indices, with any number of threads."""
    rows, cols = (4, 300) if cases.INTERPRETED else (40, 3000)
    mask = cases.random_mask(rows, cols, 0.3)
    flat = mask.view(-1).nonzero().view(-1)
    x, weight = torch.randn(flat.numel()), torch.randn(rows, cols).bfloat16()
    found = []
    threads = torch.get_num_threads()
    for layout, index, some in ((Layout.FLAT, flat, 1), (Layout.FLAT, flat.to(torch.int32), 3), (Layout.ALL, None, 3)):
        torch.set_num_threads(some)
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
    """Small steps in one direction: rounding to nearest loses most of them, compensation almost none."""
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
        # Each weight moves by only a few units: unbiased, if not exact.
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
    """The native backend caches the last call, and must notice other seeds and compensations."""
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
    """The weight has the bits of a step with float32 moments, and the moments are those, rounded."""
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
