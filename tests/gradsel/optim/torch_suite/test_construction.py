"""torch's checks of optimizers: arguments, and errors in them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)

import gradsel
from tests.gradsel.optim.torch_suite.cases import CLASSES, CPU, each_class, problem

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


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
        ({"fused": True, "foreach": True}, RuntimeError, "`fused`.*`foreach`"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused`.*`differentiable`"),
        ({"differentiable": True}, ValueError, r"torch\.optim\.Adam\(differentiable=True\)"),
        ({"lr": float("nan")}, ValueError, "learning rate.*nan"),
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
