"""torch's checks of optimizers: losses fall, schedulers and learning rates of any type take effect."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import TensorTracker
from torch.testing._internal.common_utils import TestCase as Comparison

import gradsel
import gradsel_kernels as gk
from tests.gradsel.optim.torch_suite.cases import (
    SCHEDULERS,
    HalfAdam,
    closure_of,
    each_class,
    each_input,
    problem,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@each_class
@each_input
@pytest.mark.parametrize("schedulers", [(), *SCHEDULERS], ids=lambda s: f"{len(s)} schedulers")
def test_goes_right_direction(cls, kwargs, schedulers):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    chain = [make(optimizer) for make in schedulers]
    first = loss().item()
    for _ in range(20):
        value = optimizer.step(closure_of(optimizer, loss))
        for scheduler in chain:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(value)
            else:
                scheduler.step()
    assert loss().item() > first if kwargs.get("maximize") else loss().item() < first


@each_class
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=lambda s: f"{len(s)} schedulers")
def test_param_group_with_lrscheduler_goes_right_direction(cls, schedulers):
    (weight, bias), loss = problem()
    optimizer = cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
    chain = [make(optimizer) for make in schedulers]
    first = loss().item()
    for _ in range(20):
        value = optimizer.step(closure_of(optimizer, loss))
        for scheduler in chain:
            scheduler.step(*([value] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert loss().item() < first


def test_all_schedulers_set_what_they_set_in_torch():
    """Learning rates, and betas where they cycle, over 30 steps: floats and tensors."""
    makers = {
        "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
        "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
        "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9]),
        "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
        "LinearLR": lambda o: lr_scheduler.LinearLR(o),
        "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
        "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
        "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 4),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 31),
        "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
        "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
        "SequentialLR": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    }
    known = {n for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)}
    assert known - {"LRScheduler", "_LRScheduler"} <= set(makers)
    for name, make in makers.items():
        for lr in (0.01, torch.tensor(0.01)):
            runs = []
            for cls in (gradsel.MaskedAdam, torch.optim.Adam):
                params, loss = problem()
                optimizer = cls(params, lr=copy.deepcopy(lr), foreach=False)
                scheduler, history = make(optimizer), []
                with gk.use_backend("reference"):
                    for t in range(30):
                        optimizer.step(closure_of(optimizer, loss))
                        scheduler.step(*([float(t)] if name == "ReduceLROnPlateau" else []))
                        history.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
                runs.append((history, [p.detach() for p in params]))
            assert runs[0][0] == runs[1][0], name
            rounding = {"rtol": 1e-5, "atol": 1e-6} if isinstance(lr, torch.Tensor) else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(runs[0][1], runs[1][1], **rounding)  # torch divides tensor rates in float32


@each_class
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_tensor_lr(cls, dims):
    """A tensor of any rank acts as its value does, and schedulers write into it."""
    tensor_lr = torch.tensor(0.01).view([1] * dims)
    runs = []
    for lr in (0.01, tensor_lr.clone()):
        params, loss = problem()
        optimizer = cls(params, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, loss))
            scheduler.step()
        runs.append(params)
        now = optimizer.param_groups[0]["lr"]
        assert now is lr or not isinstance(lr, torch.Tensor)
        assert float(now) == pytest.approx(0.01 / 16)
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_tensor_betas_are_read():
    runs = []
    for betas in ((0.7, 0.75), (torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.75], dtype=torch.float64))):
        params, loss = problem()
        steps(gradsel.MaskedAdam(params, betas=betas), loss, 3)
        runs.append(params)
    assert all(map(torch.equal, *runs))


@each_class
@each_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_forloop(cls, kwargs, dtype):
    """foreach and fused make the same call here; without masks each step equals torch's for-loop."""
    flags = {"foreach", "fused"}
    theirs_cls = torch.optim.AdamW if cls is gradsel.MaskedAdamW else torch.optim.Adam
    params, loss = problem(dtype=dtype)
    reference_params, reference_loss = problem(dtype=dtype)
    ours = cls(params, **kwargs)
    plain = {name: value for name, value in kwargs.items() if name not in flags}
    theirs = theirs_cls(reference_params, foreach=False, fused=False, **plain)
    if cls is HalfAdam:  # torch's, with zero gradients and no weight decay outside the selection
        theirs = cls(reference_params, **plain)
    tracker, compare = TensorTracker(), Comparison()
    with gk.use_backend("reference"):
        for _ in range(7):
            steps(theirs, reference_loss)
            for p in reference_params:
                tracker.add(p)
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    tracker.add(theirs.state[p][name])
        for _ in range(7):
            steps(ours, loss)
            for p in params:
                tracker.pop_check_set(p, compare, {"rtol": 0, "atol": 0})
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    tracker.pop_check_set(ours.state[p][name], compare, {"rtol": 0, "atol": 0})
    assert tracker.all_popped()


@each_class
def test_mixed_device_dtype(cls):
    """Parameters of four dtypes train in one group as each does alone."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

    def made():
        generator = torch.Generator().manual_seed(3)
        params = [Parameter(torch.randn(3, 4, generator=generator).to(dtype)) for dtype in dtypes]
        for p in params:
            p.grad = torch.randn(3, 4, generator=generator).to(p.dtype)
        return params

    together, alone = made(), made()
    optimizers = [cls(together, eps=1e-4), *(cls([p], eps=1e-4) for p in alone)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, dtype in zip(together, alone, dtypes, strict=True):
        assert mine.dtype is dtype
        assert torch.equal(mine, other)


def test_default_dtype_does_not_matter():
    """test_set_default_dtype_works_with_foreach"""
    runs = []
    for dtype in (torch.float64, torch.float32):
        try:
            torch.set_default_dtype(dtype)
            params, _loss = problem(dtype=torch.float32)
            optimizer = gradsel.MaskedAdam(list(params))
            torch.manual_seed(0)
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert optimizer.state[params[0]]["step"].dtype is torch.float32
        runs.append(optimizer.state[params[0]]["exp_avg"])
    assert runs[0].dtype is runs[1].dtype is torch.float32
    assert torch.equal(*runs)


@each_class
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_complex_is_refused(cls, shape):
    """test_complex, test_complex_2d"""
    parameter = Parameter(torch.randn(shape, dtype=torch.complex64))
    parameter.grad = torch.randn_like(parameter)
    optimizer = cls([parameter])
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()
    assert not optimizer.state


@each_class
def test_sparse_is_refused_in_torch_s_words(cls):
    """At the first step, and when a gradient turns sparse later."""
    for dense_steps in (0, 2):
        parameter = Parameter(torch.ones(4, 3))
        optimizer, theirs = cls([parameter]), torch.optim.Adam([parameter])
        for _ in range(dense_steps):
            parameter.grad = torch.ones(4, 3)
            optimizer.step()
        before = parameter.detach().clone(), copy.deepcopy(list(optimizer.state.values()))
        parameter.grad = torch.ones(4, 3).to_sparse()
        with pytest.raises(RuntimeError) as expected:
            theirs.step()
        with pytest.raises(RuntimeError) as got:
            optimizer.step()
        assert str(got.value) == str(expected.value)
        assert torch.equal(parameter, before[0])
        assert str(list(optimizer.state.values())) == str(before[1])
