"""Weights in any layout and dtype, and weights that others change; frozen entries keep every bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Flat, PerRow
from tests.gradsel.optim.cases import ADAM_OPTIONS, ANCHORS, assert_frozen, frozen_bits, selection_for, train
from tests.support.toy import Toy, batches, cross_entropy


def test_state_has_the_size_of_the_selection():
    model = Toy()
    selection = selection_for(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    train(model, optimizer, 1)
    trained = sum(selection[n].nnz for n, p in model.named_parameters() if p.grad is not None)
    steps = len(optimizer.state)
    assert gradsel.state_bytes(optimizer) == 8 * trained + 4 * steps
    assert all(selection[n].nnz for n, p in model.named_parameters() if p in optimizer.state)
    optimizer.param_groups[0]["anchor"] = 0.1
    train(model, optimizer, 1)
    assert gradsel.state_bytes(optimizer) == 12 * trained + 4 * steps


@pytest.mark.parametrize("options", [*ADAM_OPTIONS, {"weight_decay": 10.0}, *ANCHORS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_frozen_entries_keep_every_bit(backend, options, dtype):
    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    bits = frozen_bits(model, selection)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    for x, y in batches(6):
        optimizer.zero_grad()
        cross_entropy(model, (x.to(dtype), y)).backward()
        optimizer.step()
    assert_frozen(model, selection, bits)
    for name, p in model.named_parameters():
        if p.grad is not None and selection[name].kind == "per-row":
            assert not torch.equal(p, before[name])


def test_nan_gradients_stay_in_selected_entries(backend):
    model = Toy()
    selection = selection_for(model)
    bits = frozen_bits(model, selection)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, weight_decay=0.1, amsgrad=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert_frozen(model, selection, bits)
    assert model.head.weight.isnan().all()


def test_irregular_and_dense_masks(backend):
    model = nn.Linear(9, 4)
    dense = torch.rand(4, 9) < 0.4
    selection = gradsel.Selection.from_dense({"weight": dense, "bias": torch.zeros(4, dtype=torch.bool)})
    assert isinstance(selection["weight"], Flat)
    before = copy.deepcopy(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    model(torch.randn(5, 9)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.weight != before.weight, dense & (model.weight.grad != 0))
    assert torch.equal(model.bias, before.bias)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.to(memory_format=torch.channels_last)], ids=["nchw", "nhwc"])
def test_memory_formats_and_transposed_convolutions(backend, wrap):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Flatten(), nn.Linear(6 * 49, 5))
    expected = copy.deepcopy(model)
    data = torch.randn(3, 4, 8, 8)
    selection = gradsel.select(model, [data], lambda m, x: m(x).square().mean(), gradsel.PerNeuron(2))

    def step(net):
        optimizer = gradsel.MaskedAdam(net.named_parameters(), masks=selection, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(data).square().mean().backward()
            optimizer.step()

    bits = frozen_bits(model, selection)
    step(expected)
    model = wrap(model)
    step(model)
    assert_frozen(model, selection, bits)
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_low_precision_weights_learn_through_masters():
    """Updates below half a unit of bfloat16's last place add up instead of being lost."""
    weight = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    mask = PerRow(torch.zeros(4, 1, dtype=torch.int32), (4, 6))
    optimizer = gradsel.MaskedAdam([("w", weight)], lr=1e-4, masks=gradsel.Selection({"w": mask}))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 1), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(weight[:, :1], master.bfloat16())
    assert (weight[:, 1:] == 1).all()


def test_a_weight_written_by_others_is_taken_over():
    weight = nn.Parameter(torch.full((2, 3), 0.25, dtype=torch.bfloat16))
    optimizer = gradsel.MaskedAdam([("w", weight)], lr=1e-3)
    for written in (0.25, 5.0, -3.0):
        with torch.no_grad():
            weight[0].fill_(written)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight[0].float(), torch.full((3,), written), rtol=1e-2, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["master"][1], torch.full((3,), 0.247), rtol=1e-4, atol=0)


def test_state_of_a_float32_run_grows_masters_on_bfloat16():
    weight = nn.Parameter(torch.ones(2, 3))
    first = gradsel.MaskedAdam([weight], lr=1e-4)
    weight.grad = torch.ones_like(weight)
    first.step()
    low = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    second = gradsel.MaskedAdam([low], lr=1e-4)
    second.load_state_dict(first.state_dict())
    for _ in range(200):
        low.grad = torch.ones_like(low)
        second.step()
    torch.testing.assert_close(low.float(), torch.full((2, 3), 0.98), rtol=4e-3, atol=0)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_rows_kept_whole_on_transposed_weights(backend, k):
    """If K is at least the row's length, dense and compact gradients have the same shape."""
    parameter = nn.Parameter(torch.randn(5, 3).t())
    before = parameter.detach().clone()
    rows, n = parameter.shape
    cols = gk.topk_rows(torch.randn(rows, n), k)
    dense = PerRow(cols, (rows, n)).to_dense()
    optimizer = gradsel.MaskedAdam([("w", parameter)], masks=gradsel.Selection({"w": PerRow(cols, (rows, n))}))
    parameter.grad = torch.randn(5, 3).t()
    optimizer.step()
    assert torch.equal(parameter != before, dense)


@pytest.mark.parametrize("how", ["master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (1, 2), (0, 3), (3, 0)], ids=str)
def test_a_model_cast_between_steps(dtypes, how):
    """The plan and the state follow the cast, on both routes."""
    first, then = ([torch.float32, torch.bfloat16, torch.float16, torch.float64][i] for i in dtypes)
    model = nn.Linear(8, 6).to(first)
    selection = gradsel.select(model, None, None, criterion="random")
    optimizer = gradsel.MaskedAdam(model.named_parameters(), 1e-4, masks=selection, low_precision=how, anchor=0.1)

    def step(count=1):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()

    step(2)
    model.to(then)
    step()
    for p in model.parameters():
        state = optimizer.state[p]
        wide = torch.float64 if then is torch.float64 else torch.float32
        assert state["exp_avg"].dtype is state["original"].dtype is wide
        low = then in (torch.bfloat16, torch.float16)
        assert ("master" in state) == (low and how == "master")
        assert ("compensation" in state) == (low and how == "kahan")
        assert "compensation" not in state or state["compensation"].dtype is then
    with torch.no_grad():
        model.weight.fill_(5.0)
    before = model.weight.detach().clone()
    step()
    assert (model.weight.detach() - before).abs().max() < 0.05  # the old values are not written back


def test_data_that_is_swapped_is_taken_over():
    weight = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    optimizer = gradsel.MaskedAdam([weight], 1e-3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data = torch.full_like(weight, 5.0)
    optimizer.step()
    assert weight.detach().float().min() > 4.9


def test_a_compact_gradient_in_any_layout():
    model = nn.Linear(8, 6)
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random"))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), 1e-2)
    before = model.weight_values.detach().clone()
    model.weight_values.grad = torch.ones(()).expand(model.weight_values.shape)
    optimizer.step()
    assert (model.weight_values != before).all()
