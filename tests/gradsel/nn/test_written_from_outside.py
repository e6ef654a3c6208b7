"""Whatever writes values or weights, in whichever way: the next forward sees it, and the two agree."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradsel
from gradsel.attached import SUFFIX, selected_in
from tests.support.every_layer import RULES, attached, check_forward, every_layer, inputs, loss
from tests.support.selections import KINDS, check_consistent, check_frozen, frozen_entries, random_selection

DTYPES = [torch.float32, torch.bfloat16]


def pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Weight and values of everything that is trained in part."""
    return [
        (module._parameters[short], module._parameters[short + SUFFIX])
        for module in model.modules()
        for short in selected_in(module)
    ]


@torch.no_grad()
def in_place(tensor: nn.Parameter) -> None:
    tensor.mul_(1.5)


def through_data(tensor: nn.Parameter) -> None:
    tensor.data.mul_(1.5)


def data_copied(tensor: nn.Parameter) -> None:
    """What weight averages do."""
    tensor.data.copy_(tensor.detach() * 1.5)


def data_replaced(tensor: nn.Parameter) -> None:
    """What sharpness-aware minimisation does."""
    tensor.data = tensor.detach() * 1.5


def data_added(tensor: nn.Parameter) -> None:
    """What PEFT does to merge."""
    tensor.data += tensor.detach() * 0.5


def foreach(tensor: nn.Parameter) -> None:
    torch._foreach_mul_([tensor.data], 1.5)


WAYS = [in_place, through_data, data_copied, data_replaced, data_added, foreach]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, way: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    model, plain, selection = attached(kind, dtype)
    frozen = frozen_entries(model, selection)
    model(inputs())
    expected = [values.detach() * 1.5 for _, values in pairs(model)]
    for _, values in pairs(model):
        way(values)
    check_forward(model, plain)
    for (_, values), wanted in zip(pairs(model), expected, strict=True):
        assert torch.equal(values, wanted)
    check_consistent(model)
    check_frozen(model, selection, frozen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind: str, way: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    model, plain, _ = attached(kind, dtype)
    model(inputs())
    expected = [weight.detach() * 1.5 for weight, _ in pairs(model)]
    for weight, _ in pairs(model):
        way(weight)
    check_forward(model, plain)
    for (weight, _), wanted in zip(pairs(model), expected, strict=True):
        assert torch.equal(weight, wanted)
    check_consistent(model)


@pytest.mark.parametrize("way", WAYS)
def test_weights_keep_the_digits_of_values_that_nobody_wrote(way: Callable[[nn.Parameter], None]) -> None:
    """A bfloat16 weight that is written outside the selection leaves float32 values as they are."""
    model, _, selection = attached("per-row", torch.bfloat16)
    with torch.no_grad():
        model.linear.weight_values.add_(1e-5)
    exact = model.linear.weight_values.detach().clone()
    model(inputs())
    unselected = ~selection["linear.weight"].to_dense()
    with torch.no_grad():
        model.linear.weight[unselected] = 1.0
    model(inputs())
    assert torch.equal(model.linear.weight_values, exact)


def test_assigned_parameters_take_the_place_of_weights_and_values() -> None:
    model, plain, _ = attached("per-row", torch.float32)
    new = torch.randn_like(model.linear.weight)
    model.linear.weight = nn.Parameter(new.clone())
    check_forward(model, plain)
    assert torch.equal(model.linear.weight, new)
    values = torch.randn_like(model.linear.weight_values)
    model.linear.weight_values = nn.Parameter(values.clone())
    check_forward(model, plain)
    assert torch.equal(model.linear.weight_values, values)
    check_consistent(model)
    for bad in (
        nn.Parameter(torch.zeros(3, 3)),
        nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False),
    ):
        with pytest.raises(RuntimeError, match=r"linear.weight .*gradsel.detach\(model\)"):
            model.linear.weight = bad
    with pytest.raises(RuntimeError, match=r"linear.weight .*gradsel.detach\(model\)"):
        model.linear.weight.data = torch.zeros(9, 8)
    check_forward(model, plain)


def test_a_weight_that_was_replaced_is_a_tensor_of_its_own() -> None:
    """Whoever still holds it may read and write it, without effect on the model."""
    model, plain, _ = attached("per-row", torch.float32)
    old = model.linear.weight
    before = old.detach().clone()
    model.linear.weight = nn.Parameter(torch.randn_like(before))
    new = model.linear.weight.detach().clone()
    model(inputs())
    values = model.linear.weight_values.detach().clone()
    assert torch.equal(old + 0, before)
    with torch.no_grad():
        old.fill_(7.0)
    assert (old + 0 == 7).all()
    check_forward(model, plain)
    assert torch.equal(model.linear.weight_values, values)
    assert torch.equal(model.linear.weight, new)


def test_a_refused_assignment_leaves_recurrent_layers_as_they_are() -> None:
    """They note a new parameter before it is registered."""
    model, plain, _ = attached("per-row", torch.float32)
    for bad in (
        nn.Parameter(torch.zeros(25, 8)),
        nn.Parameter(torch.zeros(24, 8, dtype=torch.int8), requires_grad=False),
    ):
        with pytest.raises(RuntimeError, match=r"recurrent.weight_ih_l0 .*gradsel.detach\(model\)"):
            model.recurrent.weight_ih_l0 = bad
        check_forward(model, plain)


def test_initialisers() -> None:
    model, plain, _ = attached("per-row", torch.float32)
    weight = model.linear.weight
    for initialise in (nn.init.eye_, nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.kaiming_uniform_):
        initialise(weight)
        written = weight.detach().clone()
        check_forward(model, plain)
        check_consistent(model)
        assert torch.equal(model.linear.weight, written)
    assert not torch.equal(written, torch.eye(8))


def test_both_written_between_two_forwards() -> None:
    """The later write counts."""
    model, plain, selection = attached("per-row", torch.float32)
    mask = selection["linear.weight"]
    with torch.no_grad():
        model.linear.weight.fill_(2.0)
        model.linear.weight_values.fill_(3.0)
        check_forward(model, plain)
        assert (mask.gather(model.linear.weight) == 3).all()
        model.linear.weight_values.fill_(4.0)
        model.linear.weight.fill_(5.0)
        check_forward(model, plain)
        assert (model.linear.weight == 5).all()
        assert (model.linear.weight_values == 5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_with_other_values(kind: str) -> None:
    model, plain, _ = attached(kind, torch.float64)
    own = {name: p for name, p in model.named_parameters() if name.endswith(SUFFIX)}
    others = {name: (p.detach() * 2).requires_grad_() for name, p in own.items()}
    output = torch.func.functional_call(model, others, (inputs(),))
    dense = copy.deepcopy(plain)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            if name in others:
                p.copy_(others[name])
    assert torch.equal(output, expected(inputs()))
    if others:
        grads = torch.autograd.grad(output.square().sum(), list(others.values()))
        expected(inputs()).square().sum().backward()
        for (name, _), grad in zip(others.items(), grads, strict=True):
            assert torch.equal(grad, expected.get_parameter(name).grad)
    check_forward(model, dense)  # and its own values afterwards


def test_functional_call_with_other_weights_is_refused() -> None:
    model, _, _ = attached("per-row", torch.float32)
    with pytest.raises(RuntimeError, match=r"linear.weight .*linear.weight_values to functional_call"):
        torch.func.functional_call(model, {"linear.weight": torch.zeros(8, 8)}, (inputs(),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_schedule_free_and_averages(dtype: torch.dtype) -> None:
    """An optimizer that swaps values for their averages to evaluate, and a weight average that copies them in."""
    model, plain, _ = attached("per-row", dtype)
    trained = gradsel.trainable_parameters(model)
    averages = [p.detach().clone() for p in trained]
    optimizer = gradsel.MaskedAdam(trained, lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        check_consistent(model)
        for average, p in zip(averages, trained, strict=True):
            average.lerp_(p.detach(), 0.5)
    stored = [p.detach().clone() for p in trained]
    for p, average in zip(trained, averages, strict=True):
        p.data.copy_(average)
    check_forward(model, plain)
    state = copy.deepcopy(model.state_dict())
    for p, own in zip(trained, stored, strict=True):
        p.data.copy_(own)
    check_forward(model, plain)
    other = every_layer(dtype)
    gradsel.attach(other, random_selection(other, "per-row", **RULES))
    other.load_state_dict(state)
    for p, average in zip(gradsel.trainable_parameters(other), averages, strict=True):
        assert torch.equal(p, average)


@pytest.mark.parametrize("kind", KINDS)
def test_values_in_one_block_of_memory(kind: str) -> None:
    """DeepSpeed makes all parameters views of one buffer, and writes to that."""
    model, plain, _ = attached(kind, torch.float32)
    trained = gradsel.trainable_parameters(model)
    block = torch.cat([p.detach().view(-1) for p in trained])
    for p, part in zip(trained, block.split([p.numel() for p in trained]), strict=True):
        p.data = part.view(p.shape)
    for step in range(3):
        model.zero_grad()
        loss(model, step).backward()
        block.add_(torch.cat([p.grad.view(-1) if p.grad is not None else torch.zeros(p.numel()) for p in trained]))
        check_forward(model, plain)
    for weight, values in pairs(model):
        before = values.detach().clone()
        weight.data.mul_(1.5)  # what others write to the weight is taken over, nevertheless
        check_forward(model, plain)
        torch.testing.assert_close(values.detach(), 1.5 * before)


def test_saving_and_exporting_agree_with_the_values(tmp_path) -> None:
    from safetensors.torch import load_file

    model, plain, _ = attached("per-row", torch.float32)
    with torch.no_grad():
        for _, values in pairs(model):
            values.add_(1.0)
    gradsel.export(model, tmp_path / "plain.safetensors")
    exported = copy.deepcopy(plain)
    exported.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    with_delta = copy.deepcopy(plain)
    gradsel.load_delta(with_delta, gradsel.Delta.of(model))
    for p, q in zip(exported.parameters(), with_delta.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(exported(inputs()), model(inputs()))


class SharpnessAware(torch.optim.Optimizer):
    """The two steps of SAM: up to the sharpest point nearby, then back and down."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["before"] = p.data.clone()
            p.add_(p.grad, alpha=0.1)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["before"]
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_sharpness_aware_minimisation_equals_the_dense_one() -> None:
    model, plain, selection = attached("per-row", torch.float64)
    gradsel.freeze(plain, selection)
    optimizer = SharpnessAware(gradsel.trainable_parameters(model), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        second = loss(model)
        second.backward()
        optimizer.step()
        losses.append(second.item())
    dense_losses = []
    masks = {name: selection[name].to_dense() for name, _ in plain.named_parameters()}
    for _ in range(3):
        before = [p.detach().clone() for p in plain.parameters()]
        grads = _masked_grads(plain, masks)
        with torch.no_grad():
            for p, grad in zip(plain.parameters(), grads, strict=True):
                p.add_(grad, alpha=0.1)
        dense_losses.append(loss(plain).item())
        grads = _masked_grads(plain, masks)
        with torch.no_grad():
            for p, grad, old in zip(plain.parameters(), grads, before, strict=True):
                p.copy_(old - 0.1 * grad)
    assert losses == pytest.approx(dense_losses, rel=1e-12)


def _masked_grads(model: nn.Module, masks: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss(model).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad * masks[name] for name, p in model.named_parameters()]
