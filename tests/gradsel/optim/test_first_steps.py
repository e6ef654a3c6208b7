"""MaskedAdam with policy= where there is nothing to select yet, where parameters come late, or something is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import gradsel
from gradsel.masks import Frozen
from tests.kernels.cases import same_bits

LATE = "have gradients but are not trained, first {}: when the optimizer selected, they were not in it"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def net():
    torch.manual_seed(0)
    return Net()


def gradients(model, batch=0):
    model.zero_grad()
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(batch))
    nn.functional.cross_entropy(model(x), torch.arange(9) % 3).backward()


def optimizer_for(model, params=None, **options):
    params = params or list(model.named_parameters())
    return gradsel.MaskedAdamW(params, lr=1e-2, policy=gradsel.PerNeuron(2), model=model, **options)


def bits_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before):
    return {name for name, parameter in model.named_parameters() if not same_bits(parameter.detach(), before[name])}


@pytest.mark.parametrize("select_after", [1, 2])
@pytest.mark.parametrize("frozen", [False, True], ids=["zero head", "frozen body"])
def test_until_there_is_something_to_rank_the_rest_is_trained(frozen, select_after):
    """As torch's AdamW does it: otherwise a head of zeros would stay zero, and nothing would ever be selected."""
    model = net()
    if frozen:
        model.body.requires_grad_(False)
    else:
        nn.init.zeros_(model.head.weight)
    twin = copy.deepcopy(model)
    before, early = bits_of(model), {"head.weight", "head.bias"}
    # Without a gradient biases are left alone; those of the body have one of zero, which still decays them.
    early |= set() if frozen else {"body.0.bias", "body.2.bias"}
    optimizer = optimizer_for(model, select_after=select_after)
    whole = [parameter for name, parameter in twin.named_parameters() if name in early]
    dense = torch.optim.AdamW(whole, lr=1e-2, foreach=False)
    reports: list[str] = []
    for _ in range(3 if frozen else 1):
        for each in (model, twin):
            gradients(each)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        reports += map(str, [each.message for each in caught])
        dense.step()
    count = 2 if frozen else 0
    assert len(reports) == 1
    assert f"none of the 2 ranked parameters has a gradient other than zero ({count} have requires_grad" in reports[0]
    assert optimizer.selection is None
    assert moved(model, before) == early
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8)
    model.requires_grad_(True)
    twin.requires_grad_(True)
    resumed = optimizer_for(other := copy.deepcopy(model), select_after=select_after)
    resumed.load_state_dict(optimizer.state_dict())
    data = [torch.randn(9, 6, generator=torch.Generator().manual_seed(i)) for i in range(1, 1 + select_after)]
    expected = gradsel.select(
        copy.deepcopy(model).eval(),
        data,
        lambda net, x: nn.functional.cross_entropy(net(x), torch.arange(9) % 3),
        gradsel.PerNeuron(2),
    )
    for step in range(1, 4):
        for net_, each in ((model, optimizer), (other, resumed)):
            gradients(net_, step)
            each.step()
        assert (optimizer.selection is None) == (step < select_after)
    assert optimizer.selection == expected
    assert float(optimizer.state[model.head.weight]["step"]) == (3 if frozen else 1) + 4 - select_after
    assert float(optimizer.state[model.body[0].weight]["step"]) == 4 - select_after
    assert not moved(other, bits_of(model))
    for name, mask in expected.items():
        unselected = ~mask.to_dense()
        assert same_bits(model.get_parameter(name).detach()[unselected], before[name][unselected]), name


@pytest.mark.filterwarnings("error")
def test_an_optimizer_for_every_parameter():
    """As in training with the optimizer in backward: most of them have nothing to rank."""
    model, twin = net(), net()
    together = optimizer_for(twin)
    alone = [optimizer_for(model, [named]) for named in model.named_parameters()]
    for step in range(3):
        gradients(model, step)
        gradients(twin, step)
        together.step()
        for optimizer in alone:
            optimizer.step()
        assert not moved(model, bits_of(twin))


@pytest.mark.parametrize("how", ["requires_grad", "add_param_group"])
def test_parameters_that_come_after_the_selection_are_reported(how):
    model = net()
    late = {"body.2.weight", "body.2.bias"}
    if how == "requires_grad":
        model.body[2].requires_grad_(False)
        optimizer = optimizer_for(model)
    else:
        optimizer = optimizer_for(model, [each for each in model.named_parameters() if each[0] not in late])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            model.body[2].zero_grad()
            gradients(model, step)
            optimizer.step()
    if how == "requires_grad":
        model.body[2].requires_grad_(True)
    else:
        optimizer.add_param_group({"params": [each for each in model.named_parameters() if each[0] in late]})
    before = bits_of(model)
    gradients(model, 2)
    with pytest.warns(UserWarning, match="2 parameters " + LATE.format("body.2.weight")):
        optimizer.step()
    assert not moved(model, before) & late
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, 3)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    masks = {**optimizer.selection, **{name: gradsel.masks.Whole(model.get_parameter(name).shape) for name in late}}
    optimizer.reselect(gradsel.Selection(masks))
    gradients(model, 4)
    optimizer.step()
    assert late <= moved(model, before)


def test_what_the_step_refuses_is_refused_before_it_selects():
    """Also where the fused operator does not take the parameter."""
    model = net()
    model.tokens = nn.Embedding(4, 6, sparse=True)
    optimizer = optimizer_for(model, rules={"whole": ["tokens.weight"]})
    before = bits_of(model)
    model.zero_grad()
    nn.functional.cross_entropy(model(model.tokens(torch.arange(3))), torch.arange(3)).backward()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert optimizer.selection is None
    assert not optimizer.state
    assert not moved(model, before)
    gradients(model)
    optimizer.step()
    assert isinstance(optimizer.selection["body.1.weight"], Frozen)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_weight_that_has_been_resized_is_refused(steps):
    model = net()
    optimizer = optimizer_for(model)
    for _ in range(steps):
        gradients(model)
        optimizer.step()
    model.zero_grad()
    model.body[0].weight.data = torch.ones(8, 7)
    before = bits_of(model)
    model(torch.ones(2, 7)).sum().backward()
    with pytest.raises(ValueError, match=r"\[8, 7\].* \[8, 6\]"):
        optimizer.step()
    assert not moved(model, before)


def test_nothing_to_train():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="nothing would be trained"):
        optimizer_for(model)


def test_gradients_added_up_for_another_model_are_refused():
    model = net()
    optimizer = optimizer_for(model, select_after=2)
    gradients(model)
    optimizer.step()
    state = optimizer.state_dict()
    state["selection"]["sums"]["body.0.weight"] = torch.ones(8, 7)
    with pytest.raises(ValueError, match=r"for another model, first body\.0\.weight"):
        optimizer.load_state_dict(state)
    gradients(model, 1)
    optimizer.step()
    assert optimizer.selection is not None


def test_a_selection_that_is_given_ends_the_sums():
    model = net()
    selection = optimizer_for(model)
    gradients(model)
    selection.step()
    optimizer = optimizer_for(model, select_after=3)
    gradients(model)
    optimizer.step()
    assert optimizer.state_dict()["selection"]["sums"]
    optimizer.reselect(selection.selection)
    assert not optimizer.state_dict()["selection"]["sums"]


def magnitudes(weight, grad):
    return weight.abs() + grad.abs()


@pytest.mark.parametrize(("criterion", "select_after"), [("gradient", 2), (magnitudes, 1)])
def test_the_scale_of_a_scaler_ranks_nothing(criterion, select_after):
    """With fused=True the optimizer gets scaled gradients, and after an overflow by another scale."""
    found = []
    for fused in (None, True):
        model = net()
        optimizer = optimizer_for(model, criterion=criterion, select_after=select_after, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, backoff_factor=2.0**-8)
        for step in range(3):
            gradients(model, step)
            for parameter in model.parameters():
                parameter.grad *= scaler.get_scale()
            scaler.scale(torch.zeros(()))
            if step == 1:
                model.head.bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        found.append(optimizer.selection)
    assert found[0] == found[1]


@pytest.mark.parametrize("requires_grad", [True, False])
def test_attach_tells_what_it_takes_from_other_optimizers(requires_grad):
    model = net()
    model.head.requires_grad_(requires_grad)
    optimizer = optimizer_for(model, list(model.body.named_parameters("body")))
    gradients(model)
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.attach(model)
    reports = [str(each.message) for each in caught]
    if requires_grad:
        (report,) = reports
        assert "2 parameters that this optimizer does not have are frozen now, first head.weight" in report
    else:
        assert not reports


@pytest.mark.filterwarnings("ignore:1 ranked parameters got no gradient")
def test_names_that_end_like_those_of_values():
    """As in a layer of memory, with keys and values: such parameters are ranked, saved and attached like all others."""

    def memory():
        torch.manual_seed(0)
        model = net()
        model.body[2].register_parameter("slot_values", nn.Parameter(torch.randn(5, 8)))
        model.body[2].register_parameter("slot", nn.Parameter(torch.randn(5, 8)))
        model.body[2].forward = lambda x: x @ (model.body[2].slot_values + 2 * model.body[2].slot).T
        return model

    model, before = memory(), bits_of(memory())
    optimizer = optimizer_for(model)
    gradients(model)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    gradients(model, 1)
    optimizer.step()
    for name in ("body.2.slot", "body.2.slot_values"):
        assert optimizer.selection[name].nnz == 10
        different = model.get_parameter(name) != before[name]
        assert torch.equal(different, optimizer.selection[name].to_dense()), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zero", [False, True], ids=["no gradients", "gradients of zero"])
def test_steps_without_gradients_do_not_count_to_the_next_selection(zero):
    model = net()
    optimizer = optimizer_for(model, reselect_every=2)
    gradients(model)
    optimizer.step()
    gradients(model, 1)
    optimizer.step()
    first, before = optimizer.selection, bits_of(model)
    optimizer.zero_grad()
    if zero:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.selection is first
    assert moved(model, before) == ({name for name, mask in first.items() if mask.nnz} if zero else set())
    gradients(model, 2)
    optimizer.step()
    assert optimizer.selection != first
