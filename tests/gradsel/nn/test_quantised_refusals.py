"""Quantised layers that cannot be trained, or not as they are, are refused by name, with what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from gradsel.quantised import quantised_weight
from tests.support.quantised import GROUP, HIDDEN, INPUTS, Net, batch, loss, quantised, quantised_net


def select(model: nn.Module, **options) -> gradsel.Selection:
    return gradsel.select(model, [batch()], loss, gradsel.PerNeuron(3), **options)


class OfOthers(nn.Module):
    """A layer with codes and scales as buffers, as that of a library that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, INPUTS, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, INPUTS))
        self.bias = nn.Parameter(torch.zeros(INPUTS))


def test_layers_of_unknown_libraries_are_refused_unless_frozen_by_name() -> None:
    model = Net()
    model.down = OfOthers()
    with pytest.raises(ValueError, match=r"1 quantised layers .* first down\.qweight of a OfOthers: .*'\*\.qweight'"):
        select(model)
    model.down.forward = nn.Linear(HIDDEN, INPUTS).forward
    assert select(model, freeze=["*.qweight"])["up.weight"].nnz


class OfBitNet(nn.Module):
    """As transformers stores ternary weights: four to a byte, as a buffer called weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(INPUTS // 4, HIDDEN, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(INPUTS))


class OfEetq(nn.Module):
    """A weight of integers as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HIDDEN, INPUTS, dtype=torch.int8), requires_grad=False)
        self.weight_scales = nn.Parameter(torch.ones(INPUTS))


@pytest.mark.filterwarnings("ignore")  # torch's own quantisation is deprecated
def test_no_layer_with_integers_for_weights_is_left_out_silently() -> None:
    for layer, name in ((OfBitNet(), "weight"), (OfEetq(), "weight")):
        model = Net()
        model.down = layer
        with pytest.raises(ValueError, match=rf"first down\.{name}\b.*freeze=\['down.weight'\]"):
            select(model)
        layer.forward = nn.Linear(HIDDEN, INPUTS).forward
        assert select(model, freeze=["down.weight"])["up.weight"].nnz
    for kinds, name in (({nn.Linear}, "up._packed_params"), ({nn.LSTM}, "down._all_weight_values")):
        model = Net()
        if nn.LSTM in kinds:
            model.down = nn.LSTM(HIDDEN, INPUTS)
        packed = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
        with pytest.raises(ValueError, match=rf"quantised layers .* first {name} of a L"):
            select(packed)


def test_a_quantised_head_is_refused() -> None:
    model = quantised_net("nf4")
    model.head = quantised_net("nf4").up
    with pytest.raises(ValueError, match=r"head\.weight: it is a quantised head.*llm_int8_skip_modules"):
        select(model)
    with pytest.raises(ValueError, match=r"whole names up\.weight, which is quantised"):
        select(quantised_net("nf4"), whole=["up.weight"])


def test_weights_repacked_for_inference_are_refused() -> None:
    model = quantised_net("nf4")
    model.up.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"up\.weight.*packed it anew for inference.*train\(\) mode"):
        select(model)


def test_weights_that_are_not_quantised_yet_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(ValueError, match=r"up\.weight.*not quantised yet"):
        select(Net(lambda inputs, outputs: bnb.nn.Linear4bit(inputs, outputs)))


def test_layers_of_torchao_that_quantise_inputs_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = Net()
    quantization.quantize_(
        model, quantization.Int8DynamicActivationInt8WeightConfig(), lambda module, path: path in ("up", "down")
    )
    with pytest.raises(ValueError, match=r"up\.weight.*quantises the inputs.*weight-only"):
        select(model)


def test_layers_of_quanto_that_quantise_inputs_are_refused() -> None:
    reason = "optimum-quanto is not installed: pip install optimum-quanto"
    quanto = pytest.importorskip("optimum.quanto", reason=reason)
    model = Net()
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8, exclude=["head"])
    quanto.freeze(model)
    with pytest.raises(ValueError, match=r"up\.weight.*quanto quantises the inputs.*without activations"):
        select(model)


def test_convolutions_of_quanto_are_refused_by_name() -> None:
    reason = "optimum-quanto is not installed: pip install optimum-quanto"
    quanto = pytest.importorskip("optimum.quanto", reason=reason)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv2d(3, 4, 1))
    selection = gradsel.select(model, None, None, criterion="random")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    advice = r"1\.weight.*only QLinear can be trained: leave every QConv2d out.*exclude=.*freeze"
    with pytest.raises(ValueError, match=advice):
        gradsel.select(model, None, None, criterion="random")
    with pytest.raises(ValueError, match=advice):
        gradsel.attach(model, selection)


def test_layers_of_compressed_tensors_are_refused_before_and_after_they_are_made_dense() -> None:
    reason = "compressed-tensors is not installed: pip install compressed-tensors"
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    from compressed_tensors.compressors import compress_module, decompress_module

    weights = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    model = Net()
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["head"])
    )
    for layer in (model.up, model.down):
        layer.weight_scale.data.fill_(0.02)
        compress_module(layer)
    for stored in ("weight_packed", "weight"):
        with pytest.raises(
            ValueError, match=rf"2 quantised layers .* up\.{stored} .*CompressedTensorsConfig\(dequantize"
        ):
            select(model)
        if stored == "weight_packed":
            for layer in (model.up, model.down):
                decompress_module(layer)


def test_kernels_for_inference_are_refused() -> None:
    quantised("gptq int4", nn.Linear(INPUTS, HIDDEN))  # skips without gptqmodel
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.torch_int8 import TorchInt8Linear

    options = {
        "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "in_features": INPUTS, "out_features": HIDDEN,
    }  # fmt: skip
    model = Net()
    model.up = TorchInt8Linear(**{**options, "bits": 8})
    with pytest.raises(ValueError, match=r"up\.qweight of a TorchInt8Linear: .*backend='auto_trainable'"):
        select(model)
    model.up = TorchAtenLinear(**options)
    model.up.post_init()
    assert quantised_weight(model.up) is not None
    model.up.eval()(torch.zeros(1, INPUTS, dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"up\.q\w+ of a TorchAtenLinear: gptqmodel has packed it anew.*train\(\) mode"
    ):
        select(model)


@pytest.mark.parametrize("library", ["awq", "auto_round_extension"])
def test_layers_of_libraries_that_others_have_replaced_are_refused_with_what_to_do(library: str) -> None:
    if library == "awq":
        gemm = pytest.importorskip("awq.modules.linear.gemm", reason="autoawq is not installed: pip install autoawq")
        layer, hint = gemm.WQLinear_GEMM(4, GROUP, INPUTS, HIDDEN, True, "cpu"), r"with gptqmodel.*auto_trainable"
    else:
        extension = pytest.importorskip(
            "auto_round_extension.torch.qlinear_torch", reason="auto-round is not installed: pip install auto-round"
        )
        layer, hint = extension.QuantLinear(4, GROUP, INPUTS, HIDDEN, True), r"format='auto_gptq'"
    model = Net()
    model.up = layer
    with pytest.raises(ValueError, match=rf"first up\.qweight of a \w+: .*{hint}.*freeze=\['\*\.qweight'\]"):
        select(model)


def test_optimizers_that_select_are_refused() -> None:
    model = quantised_net("nf4")
    with pytest.raises(ValueError, match=r"2 ranked weights are quantised, first up\.weight.*gradsel\.select"):
        gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1), model=model)


def test_differences_that_were_cast_are_refused() -> None:
    model = quantised_net("nf4")
    gradsel.attach(model, select(model))
    model.up.weight_values.data = model.up.weight_values.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"up\.weight_values has become torch\.bfloat16"):
        model(batch()[0])


def test_a_replaced_weight_is_noticed() -> None:
    model = quantised_net("nf4")
    gradsel.attach(model, select(model))
    model.up.weight = nn.Parameter(torch.zeros(HIDDEN, INPUTS))
    with pytest.raises(RuntimeError, match=r"up\.weight was quantised when the model was attached and is a Parameter"):
        model(batch()[0])


def test_masks_of_every_kind_know_the_dense_shape() -> None:
    model = quantised_net("nf4")
    selection = select(model)
    other = Net(lambda inputs, outputs: quantised_net("nf4").up)
    assert quantised_weight(other.down).shape == (HIDDEN, INPUTS)
    with pytest.raises(ValueError, match=r"down\.weight is for shape \[64, 96\], the parameter has \[96, 64\]"):
        gradsel.attach(other, selection)
