"""Gradient clipping over the selected entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from tests.gradsel.optim.cases import masked, random_masks, selection_for, wide_grads
from tests.support.toy import Toy, batches


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), "inf"])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("attached", [False, True])
def test_clipping_is_torch_s_on_the_selected_entries(norm_type, max_norm, attached):
    model = Toy().eval()
    selection = selection_for(model, 2)
    wide_grads(model, batches()[0])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and selection[name].nnz}
    gathered = [nn.Parameter(torch.zeros_like(selection[name].gather(grad))) for name, grad in grads.items()]
    for p, (name, grad) in zip(gathered, grads.items(), strict=True):
        p.grad = selection[name].gather(grad)
    wide = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = torch.nn.utils.clip_grad_norm_(gathered, max_norm, norm_type)
    if attached:
        gradsel.attach(model, selection)
        wide_grads(model, batches()[0])
        parameters = gradsel.trainable_parameters(model)
        optimizer = gradsel.MaskedAdam(parameters)
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        torch_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        clipped = [p.grad for p in parameters if p.grad is not None]
        for p, grad in zip([p for p in parameters if p.grad is not None], before, strict=True):
            p.grad = grad
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        assert torch.equal(norm, torch_norm)
        assert all(map(torch.equal, clipped, [p.grad for p in parameters if p.grad is not None]))
        torch.testing.assert_close(norm, expected)
        return
    optimizer = masked(model, selection)
    norm = optimizer.clip_grad_norm_(max_norm, norm_type)
    assert torch.equal(norm, expected)
    assert norm < torch.nn.utils.get_total_norm(wide, float(norm_type)) or float(norm_type) == float("inf")
    for p, (name, grad) in zip(gathered, grads.items(), strict=True):
        assert torch.equal(selection[name].gather(grad), p.grad)


def test_clipping_looks_at_selected_entries_only_and_reports_what_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = masked(model, random_masks(model, 0, 1))
    assert optimizer.clip_grad_norm_(1.0) == 0
    selected = optimizer._masks[model[0].weight].to_dense()
    model[0].weight.grad = torch.where(selected, 2.0, float("nan"))
    norm = optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    torch.testing.assert_close(norm, torch.tensor(12.0).sqrt())
    torch.testing.assert_close(model[0].weight.grad[selected], torch.full((3,), 3**-0.5), rtol=1e-5, atol=0)
    model[0].bias.grad = torch.full((3,), float("inf"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
