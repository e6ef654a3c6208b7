"""Quantised layers: selected by the gradient of the dequantised weight, and trained as differences from it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.quantised import installed
from tests.support.quantised import (
    ADAPTED,
    FORMATS,
    HIDDEN,
    INPUTS,
    Net,
    batch,
    dense_net,
    loss,
    marked,
    quantised_net,
    stored_bits,
)

LAYERS = ("up.weight", "down.weight")
POLICIES = {
    "per-row": gradsel.PerNeuron(3),
    "irregular": gradsel.Global(0.02),
    "rows": gradsel.Rows(2),
    "columns": gradsel.Columns(2),
}


def select(model: nn.Module, policy: str = "per-row", **options) -> gradsel.Selection:
    return gradsel.select(model, [batch()], loss, POLICIES[policy], **options)


@pytest.mark.supports("nf4", "select")
@pytest.mark.supports("int8", "select")
@pytest.mark.supports("torchao int8", "select")
@pytest.mark.supports("torchao int4", "select")
@pytest.mark.supports("fp8", "select")
@pytest.mark.parametrize(
    "format",
    marked(
        FORMATS,
        gptq=pytest.mark.supports("GPTQ", "select"),
        awq=pytest.mark.supports("AWQ", "select"),
        hqq=pytest.mark.supports("HQQ", "select"),
        quanto=pytest.mark.supports("quanto", "select"),
    ),
)
def test_the_selection_is_that_of_the_dequantised_weights(format: str) -> None:
    model = quantised_net(format)
    before, forwards = stored_bits(model), [installed(layer) for layer in (model.up, model.down)]
    expected = select(dense_net(model))
    for memory in ("full", "streaming", "grouped"):
        budget = {"max_gradient_bytes": 4 * HIDDEN * INPUTS + 30_000} if memory == "grouped" else {}
        found = select(model, memory=memory, **budget)
        assert all(torch.equal(found[name].to_dense(), expected[name].to_dense()) for name in LAYERS)
        assert found["up.weight"].shape == (HIDDEN, INPUTS)
    assert [installed(layer) for layer in (model.up, model.down)] == forwards == [None, None]
    assert all(p.grad is None for p in model.parameters())
    after = stored_bits(model)
    assert all(torch.equal(a, b) for path in before for a, b in zip(before[path], after[path], strict=True))


@pytest.mark.parametrize("criterion", ["magnitude", "snip"])
def test_criteria_that_read_weights_read_the_dequantised_ones(criterion: str) -> None:
    model = quantised_net("nf4")
    found, expected = select(model, criterion=criterion), select(dense_net(model), criterion=criterion)
    assert all(torch.equal(found[name].to_dense(), expected[name].to_dense()) for name in LAYERS)


@pytest.mark.parametrize("format", FORMATS)
def test_before_training_a_layer_computes_what_it_did(format: str) -> None:
    model = quantised_net(format)
    x = batch()[0].requires_grad_()  # bitsandbytes repacks weights on some CPUs where no gradient is wanted
    expected = model(x)
    gradsel.attach(model, select(model))
    tolerance = 1e-3 if format.startswith("awq") else 1e-5  # to the bit, but for float8's kernel; AWQ's own is float16
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("format", ["nf4 nested", "int8", "torchao int8"])
def test_gradients_are_those_of_a_dense_weight_with_masked_differences(format: str, policy: str) -> None:
    model = quantised_net(format)
    dense = dense_net(model)
    selection = select(model, policy)
    gradsel.attach(model, selection)
    x = batch()[0].requires_grad_()
    with torch.no_grad():
        for values in (model.up.weight_values, model.down.weight_values):
            values.copy_(torch.randn_like(values) * 0.1)
    weights = {}
    for layer in ("up", "down"):
        mask = selection[f"{layer}.weight"]
        added = torch.zeros(mask.shape)
        mask.scatter_(added, getattr(model, layer).weight_values.detach())
        weights[layer] = (getattr(dense, layer).weight.detach() + added).requires_grad_()
    hidden = F.gelu(F.linear(x, weights["up"], dense.up.bias))
    expected = dense.head(F.gelu(F.linear(hidden, weights["down"], dense.down.bias)))
    output = model(x)
    torch.testing.assert_close(output, expected)
    bias = dense.up.bias
    grads = torch.autograd.grad(expected.square().sum(), [x, weights["up"], weights["down"], bias])
    found = torch.autograd.grad(
        output.square().sum(), [x, model.up.weight_values, model.down.weight_values, model.up.bias]
    )
    torch.testing.assert_close(found[0], grads[0])
    torch.testing.assert_close(found[1], selection["up.weight"].gather(grads[1]))
    torch.testing.assert_close(found[2], selection["down.weight"].gather(grads[2]))
    torch.testing.assert_close(found[3], grads[3])


@pytest.mark.supports("nf4", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("int8", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("torchao int8", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("torchao int4", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("fp8", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize(
    "format",
    marked(
        FORMATS,
        gptq=pytest.mark.supports("GPTQ", "attach", "MaskedAdam", "other optimizers"),
        awq=pytest.mark.supports("AWQ", "attach", "MaskedAdam", "other optimizers"),
        hqq=pytest.mark.supports("HQQ", "attach", "MaskedAdam", "other optimizers"),
        quanto=pytest.mark.supports("quanto", "attach", "MaskedAdam", "other optimizers"),
    ),
)
@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW", "SGD"])
def test_training_equals_that_of_a_dense_model(format: str, optimizer: str) -> None:
    model = quantised_net(format)
    dense, before = dense_net(model), stored_bits(model)
    selection = select(model)
    gradsel.attach(model, selection)
    gradsel.attach(dense, selection)
    base = {name: selection[name].gather(dense.get_parameter(name).detach()) for name in LAYERS}
    kind = {"MaskedAdamW": gradsel.MaskedAdamW, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimizer]
    for trained in (model, dense):
        steps = kind(gradsel.trainable_parameters(trained), lr=1e-2, weight_decay=0.0)
        for number in range(4):
            steps.zero_grad()
            loss(trained, batch(number)).backward()
            steps.step()
    for layer in ("up", "down"):
        found = base[f"{layer}.weight"] + getattr(model, layer).weight_values
        assert not torch.equal(found, base[f"{layer}.weight"])
        torch.testing.assert_close(found, getattr(dense, layer).weight_values.detach(), rtol=1e-4, atol=1e-5)
    after = stored_bits(model)
    assert all(torch.equal(a, b) for path in before for a, b in zip(before[path], after[path], strict=True))


def test_weight_decay_and_anchor_pull_towards_the_base() -> None:
    model = quantised_net("nf4")
    gradsel.attach(model, select(model))
    values = model.up.weight_values
    with torch.no_grad():
        values.fill_(0.5)
    values.grad = torch.zeros_like(values)
    gradsel.MaskedAdamW([values], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(values.detach(), torch.full_like(values, 0.45))
    with torch.no_grad():
        values.zero_()
    steps = gradsel.MaskedAdamW([values], lr=0.1, weight_decay=0.0, anchor=1.0)
    steps.step()
    assert not values.any()  # at its anchor already
    with torch.no_grad():
        values.fill_(0.5)
    steps.step()
    assert bool((values < 0.5).all())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_no_dense_weight_is_kept_for_backward(compute: torch.dtype) -> None:
    model = quantised_net("nf4")
    for layer in (model.up, model.down):
        layer.compute_dtype = compute
    gradsel.attach(model, select(model))
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model, batch())
    assert (HIDDEN, INPUTS) not in kept
    assert (INPUTS, HIDDEN) not in kept
    value.backward()
    assert model.up.weight_values.dtype is model.up.weight_values.grad.dtype is torch.float32
    assert bool(model.up.weight_values.grad.any())


def test_under_autocast_and_activation_checkpointing() -> None:
    model = quantised_net("int8")
    gradsel.attach(model, select(model))
    x, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.up(x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), model.up(x), rtol=2e-2, atol=2e-2)
    model.down(model.up(x)).square().sum().backward()
    expected = model.up.weight_values.grad.clone()
    model.up.weight_values.grad = None
    checkpoint(lambda x: model.down(model.up(x)), x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(model.up.weight_values.grad, expected)


def trained_net(format: str = "nf4") -> tuple[Net, gradsel.Selection]:
    model = quantised_net(format)
    selection = select(model)
    gradsel.attach(model, selection)
    steps = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    loss(model, batch()).backward()
    steps.step()
    return model, selection


def test_detach_refuses_to_lose_what_was_trained() -> None:
    model, _ = trained_net()
    base = quantised_net("nf4")
    with pytest.raises(ValueError, match=r"2 quantised weights have been trained, first down\.weight.*gradsel\.merge"):
        gradsel.detach(model)
    assert hasattr(model.up, "weight_values")
    gradsel.detach(model, restore=True)
    assert model.state_dict().keys() == base.state_dict().keys()
    x = batch()[0].requires_grad_()
    assert torch.equal(model(x), base(x))
    assert installed(model.up) is None
    gradsel.attach(model, select(model))  # and nothing is in the way of a second time


@pytest.mark.supports("nf4", "save/load")
@pytest.mark.supports("int8", "save/load")
@pytest.mark.supports("torchao int8", "save/load")
@pytest.mark.supports("torchao int4", "save/load")
@pytest.mark.supports("fp8", "save/load")
@pytest.mark.parametrize(
    "format",
    marked(
        ["nf4", "int8", "torchao int8", "torchao int4", "torchao float8", *ADAPTED],
        gptq=pytest.mark.supports("GPTQ", "save/load"),
        awq=pytest.mark.supports("AWQ", "save/load"),
        hqq=pytest.mark.supports("HQQ", "save/load"),
        quanto=pytest.mark.supports("quanto", "save/load"),
    ),
)
def test_checkpoints_copies_and_pickles_hold_the_differences(format: str) -> None:
    model, selection = trained_net(format)
    x, _ = batch()
    expected = model(x)
    again = quantised_net(format)
    gradsel.attach(again, selection)
    # bitsandbytes does not load the scales that its own 4-bit layers save
    state = {key: t for key, t in model.state_dict().items() if format != "nf4" or not key.count("weight.")}
    again.load_state_dict(state)
    copies = [again]
    if not format.startswith("quanto"):  # its tensors cannot be copied
        copies.append(copy.deepcopy(model))
    if not format.startswith("torchao"):  # its tensors cannot be pickled
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    for each in copies:
        assert torch.equal(each(x), expected)
        assert installed(each.up).module is each.up
    with torch.no_grad():
        copies[-1].up.weight_values.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(copies[-1](x), expected)


def test_a_checkpoint_of_another_selection_is_refused() -> None:
    model, _ = trained_net()
    other = quantised_net("nf4")
    gradsel.attach(other, gradsel.select(other, [batch(7)], loss, gradsel.PerNeuron(3), criterion="random"))
    with pytest.raises(RuntimeError, match=r"up\.weight_values holds the differences of another selection"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("format", ["torchao int8", "hqq int4", "quanto int8"])
def test_a_state_dict_has_the_parameters_themselves_if_asked_to(format: str) -> None:
    model, _ = trained_net(format)
    state = nn.Sequential(model).state_dict(keep_vars=True)
    assert state["0.up.weight_values"] is model.up.weight_values
    plain = model.state_dict()["up.weight_values"]
    assert not plain.requires_grad
    assert plain.data_ptr() == model.up.weight_values.data_ptr()
    gradsel.detach(model, restore=True)
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("format", ["torchao int8", "hqq int4", "quanto int8"])
@pytest.mark.parametrize("strict", [True, False])
def test_differences_of_another_size_are_reported_as_torch_does(format: str, strict: bool) -> None:
    model, _ = trained_net(format)
    before = model.up.weight_values.detach().clone()
    state = dict(model.state_dict())  # without metadata, as from a file of safetensors
    state["up.weight_values"] = torch.ones(HIDDEN, 7)
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight_values:.*\[96, 7\].*\[96, 3\]") as error:
        model.load_state_dict(state, strict=strict)
    assert "Missing" not in str(error.value)
    assert torch.equal(model.up.weight_values, before)
    del state["up.weight_values"]
    if strict:
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"up\.weight_values\""):
            model.load_state_dict(state)
    else:
        assert model.load_state_dict(state, strict=False).missing_keys == ["up.weight_values"]


def test_attach_reports_the_route() -> None:
    model = quantised_net("nf4")
    report = gradsel.attach(model, select(model))
    assert (report["up.weight"].route, report["up.weight"].why) == ("differences", "nf4")
    assert report["up.weight"].trained == 3 * HIDDEN
    assert "2 by differences from quantised weights" in str(report)
    trained = sum(p.numel() for p in gradsel.trainable_parameters(model))
    assert trained == sum(route.trained for route in report.values())


def test_ranked_sizes_are_those_of_the_dense_weights() -> None:
    assert gradsel.ranked_sizes(quantised_net("nf4"))["up.weight"] == (HIDDEN, INPUTS)
