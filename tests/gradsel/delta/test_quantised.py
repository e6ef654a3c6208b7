"""Deltas of models with quantised weights hold differences: saved, applied to the quantised or dense base, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gradsel
from gradsel.quantised import installed, quantised_weight
from tests.support.quantised import ADAPTED, FORMATS, Net, batch, dense_net, loss, marked, quantised_net, stored_bits

LAYERS = ("up.weight", "down.weight")


def trained_net(format: str = "nf4", seed: int = 0) -> tuple[Net, gradsel.Selection]:
    model = quantised_net(format, seed)
    selection = gradsel.select(model, [batch()], loss, gradsel.PerNeuron(2))
    gradsel.attach(model, selection)
    steps = gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=1e-2, weight_decay=0.0)
    for number in range(3):
        steps.zero_grad()
        loss(model, batch(number)).backward()
        steps.step()
    return model, selection


@pytest.mark.supports("nf4", "delta")
@pytest.mark.supports("int8", "delta")
@pytest.mark.supports("torchao int8", "delta")
@pytest.mark.supports("torchao int4", "delta")
@pytest.mark.supports("fp8", "delta")
@pytest.mark.parametrize(
    "format",
    marked(
        FORMATS,
        gptq=pytest.mark.supports("GPTQ", "delta"),
        awq=pytest.mark.supports("AWQ", "delta"),
        hqq=pytest.mark.supports("HQQ", "delta"),
        quanto=pytest.mark.supports("quanto", "delta"),
    ),
)
def test_a_delta_on_the_quantised_base_is_the_trained_model(format: str, tmp_path: Path) -> None:
    model, selection = trained_net(format)
    x = batch()[0].requires_grad_()
    expected = model(x)
    saved = gradsel.save_delta(model, tmp_path / "task.delta", selection=selection)
    delta = gradsel.Delta.load(tmp_path / "task.delta")
    assert delta == saved
    assert delta["up.weight"].differences == quantised_weight(model.up).kind
    assert delta["up.weight"].values.dtype is torch.float32
    assert not any(part.differences for name, part in delta.items() if name not in LAYERS)
    assert f"differences from {quantised_weight(model.up).kind}" in str(delta)
    base = quantised_net(format)
    before, outputs = stored_bits(base), base(x)
    delta.check(base)
    with delta.applied(base) as applied:
        assert torch.equal(base(x), expected)
        assert f"{delta.trainable_count():,} entries of {len(delta)} tensors" in repr(applied)
    after = stored_bits(base)
    assert torch.equal(base(x), outputs)
    assert installed(base.up) is None
    assert all(torch.equal(a, b) for path in before for a, b in zip(before[path], after[path], strict=True))


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao int8"])
def test_a_delta_on_the_dense_original_is_the_sum(format: str) -> None:
    model, selection = trained_net(format)
    delta = gradsel.Delta.of(model, selection=selection)
    dense = dense_net(quantised_net(format))
    originals = {name: dense.get_parameter(name).detach().clone() for name in LAYERS}
    handle = delta.apply_(dense)
    for name in LAYERS:
        mask = selection[name]
        found = dense.get_parameter(name).detach()
        expected = mask.gather(originals[name]) + delta[name].values
        assert torch.equal(mask.gather(found), expected)
        assert torch.equal(found[~mask.to_dense()], originals[name][~mask.to_dense()])
    torch.testing.assert_close(dense(batch()[0]), model(batch()[0]), rtol=1e-4, atol=1e-5)
    handle.revert_()
    assert all(torch.equal(dense.get_parameter(name), originals[name]) for name in LAYERS)
    half = dense_net(quantised_net(format)).bfloat16()
    with delta.applied(half, force=True):  # the head and the biases were float32
        assert half.up.weight.dtype is torch.bfloat16


def test_training_continues_from_a_delta() -> None:
    model, _ = trained_net()
    delta = gradsel.Delta.of(model)
    again = quantised_net("nf4")
    gradsel.attach(again, delta.selection(again))
    gradsel.load_delta(again, delta)
    assert torch.equal(again(batch()[0]), model(batch()[0]))
    assert gradsel.Delta.of(again) == delta
    loss(again, batch()).backward()
    assert bool(again.up.weight_values.grad.any())


def test_another_base_is_refused() -> None:
    model, _ = trained_net()
    delta = gradsel.Delta.of(model)
    other = quantised_net("nf4", seed=5)
    for attempt in (delta.check, delta.apply_):
        with pytest.raises(ValueError, match=r"2 of 2 tensors are not those .* first up\.weight"):
            attempt(other)
    assert installed(other.up) is None
    other_format = quantised_net("fp4")
    with pytest.raises(ValueError, match=r"first up\.weight"):
        delta.apply_(other_format)
    gradsel.attach(other, delta.selection(other))
    with pytest.raises(ValueError, match=r"first up\.weight"):
        gradsel.load_delta(other, delta)
    assert not other.up.weight_values.any()
    with pytest.raises(ValueError, match=r"dense in the model, so it cannot be checked"):
        delta.check(dense_net(quantised_net("nf4")))


def test_values_and_differences_are_not_confused() -> None:
    model, selection = trained_net()
    delta = gradsel.Delta.of(model)
    dense = dense_net(quantised_net("nf4"))
    gradsel.attach(dense, selection)
    values = gradsel.Delta.of(dense)
    with pytest.raises(ValueError, match=r"up\.weight is quantised \(nf4\) in the model, and the delta sets values"):
        values.apply_(quantised_net("nf4"))
    with pytest.raises(ValueError, match=r"holds differences from a quantised up\.weight, which is dense"):
        gradsel.load_delta(dense, delta)
    with pytest.raises(ValueError, match=r"up\.weight is quantised in the model, and the delta sets values"):
        gradsel.load_delta(model, values)
    with pytest.raises(ValueError, match=r"up\.weight has differences .* in one delta, and values in the other"):
        delta.merged(values, wins="self")
    assert (delta | delta) == delta
    with pytest.raises(ValueError, match=r"differences from a quantised weight, and patches set entries"):
        gradsel.patches(model)
    with pytest.raises(ValueError, match=r"differences from a quantised weight, and patches set entries"):
        gradsel.patches(delta)
    with pytest.raises(ValueError, match=r"up\.weight is quantised, so only an attached model can have trained it"):
        gradsel.Delta.of(quantised_net("nf4"), selection=selection)


def test_two_deltas_on_one_quantised_weight_are_refused() -> None:
    model, _ = trained_net()
    delta, base = gradsel.Delta.of(model), quantised_net("nf4")
    handle = delta.apply_(base)
    with pytest.raises((ValueError, RuntimeError), match=r"another delta|base"):
        delta.apply_(base, force=True)
    with pytest.raises(ValueError, match=r"a delta has been applied to"):
        gradsel.select(base, [batch()], loss, gradsel.PerNeuron(1))
    handle.revert_()
    with pytest.raises(RuntimeError, match="reverted already"):
        handle.revert_()


def test_the_version_of_a_file_says_whether_there_are_differences(tmp_path: Path) -> None:
    def metadata(path: Path) -> dict[str, str]:
        raw = path.read_bytes()
        found: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        return found

    model, selection = trained_net()
    gradsel.save_delta(model, tmp_path / "quantised.delta")
    dense = dense_net(quantised_net("nf4"))
    gradsel.attach(dense, selection)
    gradsel.save_delta(dense, tmp_path / "dense.delta")
    assert metadata(tmp_path / "quantised.delta")["version"] == "2"
    assert metadata(tmp_path / "dense.delta")["version"] == "1"
    assert "differences" not in metadata(tmp_path / "dense.delta")["parameters"]
    for name in ("quantised", "dense"):
        gradsel.Delta.load(tmp_path / f"{name}.delta").save(tmp_path / "again.delta")
        assert (tmp_path / "again.delta").read_bytes() == (tmp_path / f"{name}.delta").read_bytes()


def test_a_delta_in_bfloat16_and_as_a_lora(tmp_path: Path) -> None:
    model, _ = trained_net()
    delta = gradsel.Delta.of(model)
    rounded = gradsel.Delta.of(model, dtype=torch.bfloat16)
    assert torch.equal(rounded["up.weight"].values, delta["up.weight"].values.bfloat16())
    delta.to_lora(tmp_path / "lora", drop=True)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in ("up", "down"):
        a, b = (tensors[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
        added = torch.zeros(delta[f"{layer}.weight"].mask.shape)
        delta[f"{layer}.weight"].mask.scatter_(added, delta[f"{layer}.weight"].values)
        scale = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        patterns = scale.get("alpha_pattern", {}).get(layer, scale["lora_alpha"])
        rank = scale.get("rank_pattern", {}).get(layer, scale["r"])
        torch.testing.assert_close((patterns / rank) * (b @ a), added)


# --- Merging -------------------------------------------------------------------------------------------------------


@pytest.mark.supports("nf4", "merge")
@pytest.mark.supports("int8", "merge")
@pytest.mark.supports("torchao int8", "merge")
@pytest.mark.supports("torchao int4", "merge")
@pytest.mark.supports("fp8", "merge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "format",
    marked(
        ["nf4 nested", "int8", "torchao int8", "torchao int4", "torchao float8", *ADAPTED],
        gptq=pytest.mark.supports("GPTQ", "merge"),
        awq=pytest.mark.supports("AWQ", "merge"),
        hqq=pytest.mark.supports("HQQ", "merge"),
        quanto=pytest.mark.supports("quanto", "merge"),
    ),
)
def test_merging_to_a_dtype_gives_a_dense_model(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, selection = trained_net(format)
    expected = model(batch()[0])
    sums = {}
    for layer in ("up", "down"):
        sums[layer] = quantised_weight(getattr(model, layer)).dense(torch.float32)
        mask = selection[f"{layer}.weight"]
        mask.scatter_(sums[layer], mask.gather(sums[layer]) + getattr(model, layer).weight_values.detach())
    report = gradsel.merge(model, dtype)
    for layer in ("up", "down"):
        assert type(getattr(model, layer)) is nn.Linear
        assert torch.equal(getattr(model, layer).weight, sums[layer].to(dtype))
    assert report["up.weight"].stored_as == str(dtype).removeprefix("torch.")
    assert report.error == 0 if dtype is torch.float32 else 0 < report.error < 1
    assert "differences merged" in str(report)
    if dtype is torch.float32:
        torch.testing.assert_close(model(batch()[0]), expected, rtol=1e-4, atol=1e-5)
        gradsel.export(model, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("format", ["nf4", "nf4 nested", "fp4", "int8"])
def test_merging_to_the_quantised_format_reports_what_is_lost(format: str) -> None:
    model, selection = trained_net(format)
    delta, base = gradsel.Delta.of(model), quantised_net(format)
    delta.apply_(base)
    before = quantised_weight(base.up).dense(torch.float32)
    report = gradsel.merge(base, None)
    assert installed(base.up) is None
    found = quantised_weight(base.up)
    assert found.kind == report["up.weight"].stored_as == quantised_weight(model.up).kind
    mask = selection["up.weight"]
    wanted = before.clone()
    mask.scatter_(wanted, mask.gather(before) + delta["up.weight"].values)
    error = (found.dense(torch.float32) - wanted).abs().max()
    assert report["up.weight"].worst == pytest.approx(float(error))
    assert report["up.weight"].size == pytest.approx(float(delta["up.weight"].values.square().mean().sqrt()))
    assert report.error > 0
    assert torch.isfinite(base(batch()[0].requires_grad_())).all()


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantised layer of the model has differences"):
        gradsel.merge(quantised_net("nf4"), torch.bfloat16)
    model, _ = trained_net("torchao int8")
    with pytest.raises(ValueError, match="cannot be quantised anew"):
        gradsel.merge(model, None)
    assert bool(model.up.weight_values.any())
    assert installed(model.up) is not None
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        gradsel.merge(model, torch.int8)


@pytest.mark.parametrize("format", ["nf4 nested", "int8", "hqq int4", "quanto int8"])
def test_a_model_that_has_not_been_trained_is_exported_as_before_attach(format: str, tmp_path: Path) -> None:
    model, _ = trained_net(format)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.weight_values.zero_()
    base = quantised_net(format)
    base.head.load_state_dict(model.head.state_dict())
    for path, bias in (("up.bias", model.up.bias), ("down.bias", model.down.bias)):
        base.get_submodule(path[:-5]).bias.data.copy_(bias.detach())
    for each, file in ((base, "base"), (model, "attached")):
        gradsel.export(each, tmp_path / file)
    assert (tmp_path / "attached").read_bytes() == (tmp_path / "base").read_bytes()


def test_export_refuses_weights_of_torchao(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"up\.weight is a .*Tensor, which a safetensors file.*merge"):
        gradsel.export(quantised_net("torchao int8"), file)
    assert not file.exists()


def test_export_refuses_to_lose_differences(tmp_path: Path) -> None:
    model, _ = trained_net()
    with pytest.raises(ValueError, match=r"2 quantised layers add differences .* gradsel\.merge"):
        gradsel.export(model, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
