"""torch's checks of optimizers: states exchanged with torch's Adam, averaged models."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradsel
import gradsel_kernels as gk
from tests.gradsel.optim.torch_suite.cases import each_input, problem, steps

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@each_input
def test_state_dicts_interchange_with_torch(kwargs):
    """Without masks, states have torch's keys and contents, and either optimizer continues the other's run."""
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
    """Loading Adam's state keeps AdamW's weight decay decoupled, as in torch."""
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
