"""The checks that torch puts its own optimizers through (class TestOptimRenewed of its test suite), in our words.

They run over torch's inputs, errors and schedulers for Adam, on MaskedAdam and MaskedAdamW without masks, and on a
MaskedAdam that trains every other entry. docs/optimizer.md lists them, and those that do not apply.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)
from torch.testing._internal.common_utils import TestCase as Comparison

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Whole, from_dense

CPU = torch.device("cpu")


class HalfAdam(gradsel.MaskedAdam):
    """Every other entry of what it is given, whatever that is."""

    def add_param_group(self, param_group):
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        taken = sum(len(group["params"]) for group in self.param_groups)
        named = [p if isinstance(p, tuple) else (f"p{taken + i}", p) for i, p in enumerate(given)]
        masks = {name: half(p.shape) for name, p in named}
        super().add_param_group({**param_group, "params": named, "masks": masks})


def half(shape):
    if shape.numel() < 2:
        return Whole(shape)
    return from_dense((torch.arange(shape.numel()) % 2 == 0).view(shape))


CLASSES = [gradsel.MaskedAdam, gradsel.MaskedAdamW, HalfAdam]
SCHEDULERS = next(info.scheduler_inputs for info in optim_db if info.optim_cls is torch.optim.Adam)
FLAGS = ("foreach", "differentiable", "fused", "maximize", "capturable", "decoupled_weight_decay")


def info_of(cls):
    return OptimizerInfo(
        cls,
        optim_inputs_func=optim_inputs_func_adam,
        optim_error_inputs_func=optim_error_inputs_func_adam,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
        supports_complex=False,
    )


def all_inputs():
    """torch's inputs for Adam, each with foreach and fused."""
    return _get_optim_inputs_including_global_cliquey_kwargs(CPU, torch.float32, info_of(gradsel.MaskedAdam))


pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
each_class = pytest.mark.parametrize("cls", CLASSES)
each_input = pytest.mark.parametrize("kwargs", [i.kwargs for i in all_inputs()], ids=[i.desc for i in all_inputs()])


def problem(seed=0, dtype=torch.float32):
    """A weight, a bias, and a loss of them."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = Parameter(torch.randn(10, 5, generator=generator)), Parameter(torch.randn(10, generator=generator))
    input = torch.randn(5, generator=generator)
    weight, bias, input = (t.detach().to(dtype) for t in (weight, bias, input))
    weight, bias = Parameter(weight), Parameter(bias)

    def loss():
        return (weight.mv(input) + bias).pow(2).sum()

    return [weight, bias], loss


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def steps(optimizer, loss, count=1):
    for _ in range(count):
        optimizer.step(closure_of(optimizer, loss))


# --- Construction ------------------------------------------------------------------------------------------------


def test_the_signature_begins_as_torch_s():
    """Same names, order and defaults, so that positional arguments mean the same."""
    for ours, theirs in ((gradsel.MaskedAdam, torch.optim.Adam), (gradsel.MaskedAdamW, torch.optim.AdamW)):
        ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
        positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(positional)] == positional
        for name, parameter in theirs.items():
            assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


def test_inputs_do_not_set_global_flags():
    """test_optim_infos_do_not_specify_global_cliquey_kwargs"""
    for optim_input in optim_inputs_func_adam(CPU):
        assert not set(optim_input.kwargs) & {"foreach", "fused", "differentiable"}


@pytest.mark.parametrize("error", optim_error_inputs_func_adam(CPU, torch.float32), ids=lambda e: e.error_regex[:40])
@pytest.mark.parametrize("cls", CLASSES[:2])
def test_errors(cls, error):
    given = error.optimizer_error_input
    params = [Parameter(torch.randn(2, 3))] if given.params is None else given.params
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            cls(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(params, **given.kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"differentiable": True}, ValueError, r"use torch.optim.Adam\(differentiable=True\)"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ],
)
def test_more_errors_of_torch(kwargs, error, message):
    with pytest.raises(error, match=message):
        gradsel.MaskedAdam([Parameter(torch.ones(2))], **kwargs)


def test_a_group_cannot_be_differentiable_either():
    with pytest.raises(ValueError, match="differentiable"):
        gradsel.MaskedAdam([{"params": [Parameter(torch.ones(2))], "differentiable": True}])


@each_class
def test_capturable_is_refused_on_the_cpu_as_in_torch(cls):
    parameter = Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    theirs = torch.optim.Adam([parameter], capturable=True, foreach=False)
    with pytest.raises(AssertionError) as expected:
        theirs.step()
    ours = cls([parameter], capturable=True)
    with pytest.raises(AssertionError) as got:
        ours.step()
    assert str(got.value) == str(expected.value)
    assert not ours.state


@each_class
def test_optimizer_can_be_printed(cls):
    params, _ = problem()
    text = repr(cls(params, fused=True))
    assert text.startswith(cls.__name__)
    assert "fused: True" in text


# --- Right direction ---------------------------------------------------------------------------------------------


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
    """A tensor of any rank does what its value does, and a scheduler writes into it."""
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
    """foreach and fused are the same call here; without masks it is torch's for-loop, step by step."""
    flags = {"foreach", "fused"}
    theirs_cls = torch.optim.AdamW if cls is gradsel.MaskedAdamW else torch.optim.Adam
    params, loss = problem(dtype=dtype)
    reference_params, reference_loss = problem(dtype=dtype)
    ours = cls(params, **kwargs)
    plain = {name: value for name, value in kwargs.items() if name not in flags}
    theirs = theirs_cls(reference_params, foreach=False, fused=False, **plain)
    if cls is HalfAdam:  # torch's, with gradients of zero where nothing is selected, and without weight decay there
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
    """Parameters of four dtypes in one group are what they are alone."""
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
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        optimizer.step()
    assert not optimizer.state


@each_class
def test_sparse_is_refused_in_torch_s_words(cls):
    """At the first step, and where a gradient turns sparse later."""
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


# --- Parameter groups --------------------------------------------------------------------------------------------


@each_class
def test_param_groups_weight_decay(cls):
    (weight, bias), _loss = problem()
    before = weight.detach().clone(), bias.detach().clone()
    optimizer = cls([{"params": [weight]}, {"params": [bias], "weight_decay": 0.5}], lr=0.1, weight_decay=0.0)
    for p in (weight, bias):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert not torch.equal(bias, before[1])


@each_class
def test_param_groups_lr(cls):
    """A learning rate of zero in one group only, and of zero by default with one group that has one."""
    for rates in ((0.0, 0.01), (0.01, 0.0)):
        (weight, bias), loss = problem()
        before = [p.detach().clone() for p in (weight, bias)]
        optimizer = cls([{"params": [weight], "lr": rates[0]}, {"params": [bias], "lr": rates[1]}], lr=0.0)
        steps(optimizer, loss, 3)
        for p, old, rate in zip((weight, bias), before, rates, strict=True):
            assert torch.equal(p, old) == (rate == 0.0)


@each_class
def test_add_param_group_while_training(cls):
    (weight, bias), loss = problem()
    optimizer = cls([weight])
    steps(optimizer, loss, 2)
    bias_before = bias.detach().clone()
    optimizer.add_param_group({"params": bias, "lr": 0.1})
    steps(optimizer, loss, 2)
    assert not torch.equal(bias, bias_before)
    assert optimizer.state[weight]["step"] == 4
    assert optimizer.state[bias]["step"] == 2
    assert optimizer.param_groups[1]["eps"] == optimizer.defaults["eps"]


# --- Gradients ---------------------------------------------------------------------------------------------------


@each_class
@each_input
def test_step_is_noop_when_params_have_no_grad(cls, kwargs):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, **kwargs)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


@each_class
@each_input
def test_step_is_noop_for_zero_grads(cls, kwargs):
    """Without weight decay; the step counts."""
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, **{**kwargs, "weight_decay": 0.0})
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@each_class
def test_grad_none_keeps_the_state(cls):
    (weight, bias), loss = problem()
    optimizer = cls([weight, bias], weight_decay=0.1)
    steps(optimizer, loss, 2)
    before = bias.detach().clone(), copy.deepcopy(optimizer.state[bias])
    closure_of(optimizer, loss)()
    bias.grad = None
    optimizer.step()
    assert torch.equal(bias, before[0])
    assert str(optimizer.state[bias]) == str(before[1])
    assert (optimizer.state[weight]["step"], optimizer.state[bias]["step"]) == (3, 2)
    steps(optimizer, loss)
    assert (optimizer.state[weight]["step"], optimizer.state[bias]["step"]) == (4, 3)


@each_class
def test_empty_grad(cls):
    empty, zero_rows, other = Parameter(torch.empty(5, 0)), Parameter(torch.empty(0, 4, 2)), Parameter(torch.ones(3))
    for p in (empty, other, zero_rows):
        p.grad = torch.ones_like(p)
    optimizer = cls([empty, other, zero_rows])
    for _ in range(2):
        optimizer.step()
    assert other[0] != 1
    cls([empty]).step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


@each_class
@each_input
def test_grads_are_never_inplaced_into(cls, kwargs):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    loss().backward()
    for _ in range(2):
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for p, (grad, value, version) in zip(params, before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version


@each_class
def test_non_empty_state(cls):
    params, loss = problem()
    optimizer = cls(params)
    steps(optimizer, loss)
    for p in params:
        assert len(optimizer.state[p]) >= 3
    assert len(optimizer.state) == 2


@each_class
def test_closure_runs_with_gradients_once(cls):
    params, loss = problem()
    optimizer = cls(params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        return closure_of(optimizer, loss)()

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [1]
    assert value.requires_grad
    assert torch.is_grad_enabled()


# --- State -------------------------------------------------------------------------------------------------------


def assert_same_state_dict(a, b):
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        for name, value in state.items():
            other = b["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert str(a["param_groups"]) == str(b["param_groups"])


@each_class
@each_input
def test_state_dict_deterministic(cls, kwargs):
    """A copy that loads the state goes on with the same bits."""
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    steps(optimizer, loss, 3)
    others, other_loss = problem()
    with torch.no_grad():
        for mine, other in zip(params, others, strict=True):
            other.copy_(mine)
    second = cls(others, **kwargs)
    second.load_state_dict(optimizer.state_dict())
    assert_same_state_dict(optimizer.state_dict(), second.state_dict())
    for _ in range(3):
        steps(optimizer, loss)
        steps(second, other_loss)
        assert all(map(torch.equal, params, others))
    repeated = cls([{"params": params}], **kwargs)
    repeated.load_state_dict(optimizer.state_dict())
    assert_same_state_dict(optimizer.state_dict(), repeated.state_dict())


@each_class
@each_input
def test_can_load_older_state_dict(cls, kwargs):
    """Without the flags that came later."""
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    steps(optimizer, loss, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in FLAGS:
            del group[flag]
    optimizer.load_state_dict(old)
    steps(optimizer, loss)
    assert optimizer.param_groups[0]["maximize"] is False
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is (cls is gradsel.MaskedAdamW)


@each_class
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)], ids=str)
def test_can_load_from_to_named_state_dict(cls, named):
    optimizers = []
    for with_names in named:
        params, loss = problem()
        given = list(zip(("weight", "bias"), params, strict=True)) if with_names else params
        optimizers.append((cls(given), loss))
    (first, loss), (second, other_loss) = optimizers
    steps(first, loss, 2)
    if named == (True, True):
        first.param_groups[0]["param_names"] = ["a", "b"]
    state = first.state_dict()
    second.load_state_dict(state)
    steps(second, other_loss)
    names = second.param_groups[0].get("param_names")
    if named == (True, True):
        assert names == ["a", "b"]
    elif named == (False, True) and cls is not HalfAdam:
        assert names == ["weight", "bias"]


@each_class
@each_input
def test_save_load_equality_with_weights_only(cls, kwargs):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    steps(optimizer, loss, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_state_dict(optimizer.state_dict(), loaded)
    optimizer.load_state_dict(loaded)
    assert_same_state_dict(optimizer.state_dict(), loaded)


@each_class
@each_input
def test_load_nontensor_step(cls, kwargs):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    steps(optimizer, loss, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(old)
    steps(optimizer, loss)
    assert optimizer.state[params[0]]["step"] == 3
    assert isinstance(optimizer.state[params[0]]["step"], torch.Tensor)


def test_an_unpickled_nontensor_step():
    params, loss = problem()
    optimizer = gradsel.MaskedAdam(params)
    steps(optimizer, loss, 2)
    for state in optimizer.state.values():
        state["step"] = 2
    optimizer = copy.deepcopy(optimizer)
    assert all(torch.equal(state["step"], torch.tensor(2.0)) for state in optimizer.state.values())


@each_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_dict_of_another_dtype(cls, dtype):
    """test_state_dict_with_cuda_params, test_cpu_load_state_dict: what a load has to convert, on one device."""
    params, loss = problem()
    optimizer = cls(params)
    steps(optimizer, loss, 2)
    others = [Parameter(p.detach().to(dtype)) for p in params]
    second = cls(others)
    second.load_state_dict(optimizer.state_dict())
    for mine, other in zip(params, others, strict=True):
        kept, state = optimizer.state[mine], second.state[other]
        assert state["step"].dtype is torch.float32
        assert state["exp_avg"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(state["exp_avg"].float(), kept["exp_avg"])
        other.grad = mine.grad.to(dtype)
    second.step()
    assert second.state[others[0]]["step"] == 3


def test_load_to_the_meta_device_and_its_errors():
    """Another device than the state's; wrong sizes are refused in torch's words."""
    params, loss = problem()
    optimizer = gradsel.MaskedAdam(params)
    steps(optimizer, loss)
    there = [Parameter(torch.empty_like(p, device="meta")) for p in params]
    second = gradsel.MaskedAdam(there)
    second.load_state_dict(optimizer.state_dict())
    assert all(v.device.type == "meta" for s in second.state.values() for v in s.values())
    with pytest.raises(ValueError, match="loaded state dict has a different number of parameter groups"):
        gradsel.MaskedAdam([{"params": [p]} for p in params]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        gradsel.MaskedAdam(params[:1]).load_state_dict(optimizer.state_dict())


@each_class
def test_custom_entries_of_the_state_survive(cls):
    params, loss = problem()
    optimizer = cls(params)
    steps(optimizer, loss)
    optimizer.state[params[0]]["mine"] = torch.arange(3)
    optimizer.state[params[0]]["note"] = "text"
    optimizer.state["global"] = {"seen": 7}
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["mine"], torch.arange(3))
    assert optimizer.state[params[0]]["note"] == "text"
    assert optimizer.state["global"] == {"seen": 7}
    steps(optimizer, loss)


@each_class
@each_input
def test_deepcopy_copies_all_public_attrs(cls, kwargs):
    params, loss = problem()
    optimizer = cls(params, **kwargs)
    steps(optimizer, loss)
    second = copy.deepcopy(optimizer)

    def public(o):
        return {name for name in dir(o) if not name.startswith("_")}

    assert public(optimizer) == public(second)
    assert second._step_supports_amp_scaling == optimizer._step_supports_amp_scaling == bool(kwargs.get("fused"))
    assert_same_state_dict(optimizer.state_dict(), second.state_dict())


def test_state_bytes_are_those_of_the_selection():
    """test_peak_memory_foreach, by a measure of our own: a step allocates nothing but the state, and that once."""
    params = [Parameter(torch.ones(64, 32)), Parameter(torch.ones(64))]
    optimizer, theirs = HalfAdam(params), torch.optim.Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    theirs.step()
    assert gradsel.state_bytes(theirs) == 8 * (64 * 32 + 64) + 2 * 4
    assert gradsel.state_bytes(optimizer) == 4 * (64 * 32 + 64) + 2 * 4


# --- Hooks -------------------------------------------------------------------------------------------------------


@each_class
def test_step_hooks(cls):
    """test_step_pre_hook, test_step_post_hook, test_step_all_hooks: each once, in order, and none once removed."""
    params, loss = problem()
    optimizer = cls(params)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    steps(optimizer, loss)
    assert calls == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    steps(optimizer, loss)
    assert len(calls) == 4


@each_class
def test_a_pre_hook_may_change_the_arguments(cls):
    params, _loss = problem()
    optimizer = cls(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step(lambda: 1.0) == 7.0


@each_class
def test_state_dict_hooks(cls):
    """test_state_dict_pre_hook, _post_hook, _pre_post_hook"""
    params, _ = problem()
    optimizer = cls(params, lr=1.0)

    def before(o):
        o.state["seen"] = {"calls": o.state.get("seen", {}).get("calls", 0) + 1}

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": len(s["state"])})
    got = optimizer.state_dict()
    assert got["state"]["seen"] == {"calls": 1}
    assert got["extra"] == 1


@each_class
def test_load_state_dict_hooks(cls):
    """test_load_state_dict_pre_hook_and_prepend, _post_hook, _pre_post_hook: once, and what they return is loaded."""
    params, loss = problem()
    optimizer = cls(params, lr=0.5)
    steps(optimizer, loss)
    calls = []

    def first(o, state_dict):
        calls.append("first")
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] *= 2
        state_dict["state"][0]["exp_avg"].fill_(3.0)
        return state_dict

    def second(o, state_dict):
        calls.append("second")
        state_dict["param_groups"][0]["lr"] += 1

    def after(o):
        assert (o.state[params[0]]["exp_avg"] == 3.0).all()
        assert o.param_groups[0]["lr"] == 2.0
        calls.append("after")

    optimizer.register_load_state_dict_pre_hook(second)
    optimizer.register_load_state_dict_pre_hook(first, prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert calls == ["first", "second", "after"]
    assert not (saved["state"][0]["exp_avg"] == 3.0).any()


# --- GradScaler --------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("fused", [None, True])
def test_does_not_step_if_foundinf(cls, fused):
    """Infinite gradients skip the step and its count, and the scale falls; a finite one undoes the scale."""
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, plain = cls(params, fused=fused, weight_decay=0.1), cls(twins, fused=fused, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for infinite in (True, False, False, True, False):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        before = [p.detach().clone() for p in params]
        if infinite:
            params[1].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert all(map(torch.equal, params, before))
        else:
            steps(plain, twin_loss)
        assert all(map(torch.equal, params, twins))
    assert optimizer.state[params[0]]["step"] == 3
    assert scaler.get_scale() == 2.0**5
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_found_inf_is_a_sum_over_devices():
    (weight, bias), loss = problem()
    before = weight.detach().clone()
    optimizer = gradsel.MaskedAdam([weight, bias], fused=True)
    loss().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(2.0)
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad / 4 * (1 - 0.9), rtol=1e-5, atol=1e-7)


def test_unscale_and_clip_before_a_fused_step():
    """The gradients are unscaled by then, and GradScaler hands over no scale."""
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, plain = gradsel.MaskedAdam(params, fused=True), gradsel.MaskedAdam(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for _ in range(3):
        closure_of(plain, twin_loss)()
        torch.nn.utils.clip_grad_norm_(twins, 0.1)
        plain.step()
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert all(map(torch.equal, params, twins))


# --- Interchange with torch --------------------------------------------------------------------------------------


@each_input
def test_state_dicts_interchange_with_torch(kwargs):
    """Without masks, keys and contents are torch's, both ways, and either goes on as the other would."""
    for ours_cls, theirs_cls in ((gradsel.MaskedAdam, torch.optim.Adam), (gradsel.MaskedAdamW, torch.optim.AdamW)):
        plain = {name: value for name, value in kwargs.items() if name not in ("foreach", "fused")}
        params, loss = problem()
        twins, twin_loss = problem()
        ours = ours_cls(params, **kwargs)
        theirs = theirs_cls(twins, foreach=False, fused=False, **plain)
        with gk.use_backend("reference"):
            steps(ours, loss, 3)
            steps(theirs, twin_loss, 3)
            saved = ours.state_dict()
            assert all(s.keys() == theirs.state_dict()["state"][k].keys() for k, s in saved["state"].items())
            assert set(theirs.param_groups[0]) <= set(ours.param_groups[0])
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(saved)
            theirs.param_groups[0].update(foreach=False, fused=False)
            steps(ours, loss, 3)
            steps(theirs, twin_loss, 3)
        assert all(map(torch.equal, params, twins))


def test_adamw_serialization():
    """A state of Adam keeps AdamW's weight decay decoupled, as in torch."""
    params, loss = problem()
    adam = torch.optim.Adam(params)
    steps(adam, loss)
    optimizer = gradsel.MaskedAdamW(params)
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_swa_and_ema_models():
    """torch.optim.swa_utils: the schedule, and averages of the weights."""
    model = nn.Linear(4, 2)
    optimizer = gradsel.MaskedAdam(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert not torch.equal(averaged.module.weight, model.weight)


def test_no_warnings_in_an_ordinary_loop():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, loss = problem()
        optimizer = gradsel.MaskedAdamW(params, lr=1e-3, foreach=True)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 3)
        for _ in range(3):
            steps(optimizer, loss)
            scheduler.step()


def test_compiled_steps_are_eager_ones_and_do_not_recompile():
    """torch.compile(optimizer.step) runs, is a graph break, and takes new learning rates without compiling again."""
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, plain = HalfAdam(params), HalfAdam(twins)
    step = torch.compile(optimizer.step)
    torch._dynamo.utils.counters.clear()
    compiled = []
    for t in range(6):
        for o, f in ((optimizer, loss), (plain, twin_loss)):
            closure_of(o, f)()
            o.param_groups[0]["lr"] = 0.1 / (t + 1)
        step()
        plain.step()
        compiled.append(torch._dynamo.utils.counters["frames"]["total"])
        assert all(map(torch.equal, params, twins))
    assert compiled[1:] == compiled[1:2] * 5
