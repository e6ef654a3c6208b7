"""torch's checks of optimizers: state dicts saved, loaded, copied and cast."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import Parameter

import gradsel
from tests.gradsel.optim.torch_suite.cases import FLAGS, HalfAdam, each_class, each_input, problem, steps

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


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
    """A copy that loads the state continues with the same bits."""
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
    """States saved before some flags existed."""
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
    """test_state_dict_with_cuda_params, test_cpu_load_state_dict: what loading has to convert on one device."""
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
    """The parameters' device differs from the state's; wrong sizes are refused with torch's messages."""
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
    """test_peak_memory_foreach, measured our way: steps allocate the state once and nothing else."""
    params = [Parameter(torch.ones(64, 32)), Parameter(torch.ones(64))]
    optimizer, theirs = HalfAdam(params), torch.optim.Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    theirs.step()
    assert gradsel.state_bytes(theirs) == 8 * (64 * 32 + 64) + 2 * 4
    assert gradsel.state_bytes(optimizer) == 4 * (64 * 32 + 64) + 2 * 4
