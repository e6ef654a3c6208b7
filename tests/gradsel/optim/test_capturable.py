"""Rates that stay on the device: what a step with ``capturable`` hands to the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gradsel
from gradsel.optim import groups
from gradsel.optim.rates import rates_on
from tests.kernels.cases import INTERPRETED, same_bits
from tests.support.selections import random_selection

CPU = torch.device("cpu")


@pytest.fixture
def capturable_cpu(monkeypatch):
    """Makes the CPU a device on which steps may be captured, to run what else only CUDA tensors do."""
    monkeypatch.setattr(groups, "_get_capturable_supported_devices", lambda: ["cpu"])


def group(**options):
    return {"lr": 0.1, "betas": (0.9, 0.99), "capturable": True, **options}


def test_numbers_are_for_the_host():
    assert rates_on(group(), CPU) is None
    assert rates_on(group(lr=torch.tensor(0.1), capturable=False), CPU) is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensors_are_read_in_their_own_precision(shape):
    rates = rates_on(group(lr=torch.full(shape, 0.1)), CPU)
    assert rates.tolist() == [float(torch.tensor(0.1)), 0.9, 0.99]
    betas = (torch.full(shape, 0.9, dtype=torch.float64), torch.full(shape, 0.5))
    assert rates_on(group(betas=betas), CPU).tolist() == [0.1, 0.9, 0.5]


def test_a_tensor_on_the_host_is_read_there():
    """A graph could not copy its value."""
    rates = rates_on(group(lr=torch.tensor(0.1)), torch.device("meta"))
    assert rates.device.type == "meta"


@pytest.mark.parametrize("attached", [False, True])
def test_a_step_does_not_ask_for_them(capturable_cpu, monkeypatch, attached):
    """The bits of numbers, in the first step and in repeated ones; asking a tensor for its value would wait."""
    runs = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
        x = torch.randn(5, 8)
        parameters = list(model.parameters())
        if attached:
            gradsel.attach(model, random_selection(model))
            parameters = gradsel.trainable_parameters(model)
        lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        optimizer = gradsel.MaskedAdam(parameters, lr=lr, capturable=as_tensor, weight_decay=0.1)
        for rate in (0.1, 0.1, 0.05, 0.02):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if as_tensor:
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            with monkeypatch.context() as patch:
                for name in ("__float__", "item") if as_tensor else ():
                    patch.setattr(torch.Tensor, name, _waits)
                optimizer.step()
        runs.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(same_bits, *runs))


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not mix")
def test_nor_does_a_compiled_step(capturable_cpu):
    """It hands the tensor over, and is not compiled again for new values."""
    torch._dynamo.reset()
    runs, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 6))
        lr = torch.tensor(0.1)
        optimizer = gradsel.MaskedAdam([weight], lr=lr, capturable=True)
        step = torch.compile(optimizer.step, fullgraph=True, backend=counter) if compiled else optimizer.step
        for rate in (0.1, 0.05, 0.01):
            weight.grad = torch.full((4, 6), rate)
            lr.fill_(rate)
            step()
        runs.append(weight.detach())
    torch._dynamo.reset()
    assert same_bits(*runs)
    assert counter.frame_count == 1
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    assert not [node for node in nodes if node.target == "to"], "the rate is copied to the host"


def _waits(tensor):
    raise AssertionError("the host waits for a tensor")
