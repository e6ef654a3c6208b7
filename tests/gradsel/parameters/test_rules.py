"""What the rules make of kinds, patterns, views and heads."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

import gradsel
from gradsel.parameters.rules import HEAD, KINDS, parameter_rules, ranked_sizes
from tests.gradsel.parameters.cases import OF_KIND, Every, Flat, Holder, actions, wrapped

# --- Kinds -------------------------------------------------------------------------------------------------------


def test_there_is_a_parameter_of_every_kind():
    assert set(OF_KIND) == set(KINDS)
    assert sorted(name for names in OF_KIND.values() for name in names) == sorted(
        name for name, _ in Every().named_parameters()
    )


@pytest.mark.parametrize("action", ["rank", "whole", "freeze"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_change_one_kind_and_no_other(kind, action):
    expected = {name: KINDS[other] for other, names in OF_KIND.items() for name in names}
    assert actions(Every()) == expected
    assert actions(Every(), kinds={kind: action}) == expected | dict.fromkeys(OF_KIND[kind], action)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_ranked_can_be_selected_and_trained(kind):
    model = Every()
    nn.init.normal_(model.norm.bias)
    kinds = dict.fromkeys(KINDS, "freeze") | {kind: "rank"}
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(1), "magnitude", kinds=kinds)
    assert [name for name, mask in selection.items() if mask.nnz] == OF_KIND[kind]
    gradsel.attach(model, selection)
    gradsel.detach(model)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"normalization": "whole"}, "kinds .*'normalization'.*normalisation"),
        ({"wait": "whole"}, "'wait'.*weight"),
        ({"bias": "frozen"}, r"kinds\['bias'\] .*'frozen'.*rank, whole, freeze"),
        ({"xyz": "whole"}, "kinds .*'xyz'.*weight, bias, head, [^?]*$"),
    ],
)
def test_unknown_kinds_and_actions(kinds, message):
    with pytest.raises(ValueError, match=message):
        parameter_rules(Every(), kinds=kinds)


def test_patterns_go_before_kinds():
    found = actions(Every(), kinds={"bias": "freeze", "normalisation": "whole"}, rank=["*.bias"], freeze=["norm.*"])
    assert found["proj_in.bias"] == found["norm.bias"] == "rank"  # rank goes before freeze
    assert found["norm.weight"] == "freeze"


class GRN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, 6))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, 6))


class NormalizedLinear(nn.Linear):
    """A projection, although it is called a norm."""


class PatchEmbedding(nn.Conv2d):
    """A convolution, although it is called an embedding."""


class PromptEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


class BN(nn.BatchNorm2d):
    """A norm, although it is not called one."""


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("part", "reasons"),
    [
        (GRN(), {"weight": "normalisation", "bias": "normalisation"}),
        (BN(3), {"weight": "normalisation", "bias": "normalisation"}),
        (NormalizedLinear(3, 4), {"weight": "weight", "bias": "bias"}),
        (PatchEmbedding(3, 4, 2), {"weight": "weight", "bias": "bias"}),
        (PromptEmbeddings(), {"weight": "embedding"}),  # frozen, but named as an embedding
        (LayerScale(), {"scale": "layer scale"}),
        (nn.EmbeddingBag(3, 4), {"weight": "embedding"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_name_does_not_hide_what_a_layer_is(part, reasons):
    found = {name.removeprefix("part."): rule.reason for name, rule in parameter_rules(Holder(part=part)).items()}
    assert found == reasons


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("iou_token", "token"),
        ("query_tokens", "token"),
        ("register_tokens", "token"),
        ("no_mask_embed", "embedding"),
        ("wpe", "position embedding"),
        ("embed_positions", "position embedding"),
        ("position_embedding", "position embedding"),
        ("relative_attention_bias", "position table"),
        ("attention_biases", "position table"),
    ],
)
def test_embeddings_are_told_apart_by_the_names_of_their_modules(name, kind):
    rule = parameter_rules(Holder(**{name: nn.Embedding(3, 4), "linear": nn.Linear(2, 2)}))[f"{name}.weight"]
    assert (rule.action, rule.reason) == (KINDS[kind], kind)


def test_vectors_with_dimensions_for_broadcasting_are_no_matrices():
    """Swin V2's logit scale, MultiheadAttention's bias_k, a 1x1 depthwise convolution, which is one."""
    model = Holder(
        logit_scale=nn.Parameter(torch.ones(3, 1, 1)),
        attention=nn.MultiheadAttention(4, 2, add_bias_kv=True),
        depthwise=nn.Conv2d(5, 5, 1, groups=5),
        table=nn.Parameter(torch.ones(2, 3, 4)),
    )
    found = {name: rule.reason for name, rule in parameter_rules(model).items()}
    assert found["logit_scale"] == "neither weight nor bias"
    assert found["attention.bias_k"] == found["attention.bias_v"] == "bias"
    assert found["depthwise.weight"] == found["table"] == "weight"


# --- Views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [gradsel.PerNeuron(1), gradsel.Rows(1), gradsel.Global(count=1)], ids=str)
@pytest.mark.parametrize("options", [{"rank": ["scale"]}, {"kinds": {"other": "rank"}}], ids=["rank=", "kinds="])
def test_a_parameter_without_dimensions_is_trained_whole(options, policy):
    """CLIP's logit_scale: a single number is not a layer of neurons."""
    model = Holder(scale=nn.Parameter(torch.tensor(2.0)), linear=nn.Linear(2, 2))
    assert parameter_rules(model)["scale"].action == "freeze"
    rule = parameter_rules(model, **options)["scale"]
    assert rule.action == "whole"
    assert rule.view.shape(()) == (1, 1)
    selection = gradsel.select(model, None, None, policy, "magnitude", **options)
    assert selection["scale"].kind == "whole"
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.5)
    (model.scale * model.linear(torch.ones(2)).sum()).backward()
    optimizer.step()
    gradsel.detach(model)
    assert abs(model.scale.item() - 2) == pytest.approx(0.5)


def test_biases_have_one_number_for_each_neuron():
    experts = Holder(
        gate_up_proj=nn.Parameter(torch.randn(2, 3, 8)),
        gate_up_proj_bias=nn.Parameter(torch.randn(2, 8)),
    )
    experts.is_transposed = True
    model = Holder(experts=experts, up=nn.ConvTranspose2d(4, 6, 2, groups=2), up_one=nn.ConvTranspose1d(4, 5, 2))
    model.out = nn.Linear(3, 2)
    assert ranked_sizes(model, kinds={"bias": "rank"}) == {
        "experts.gate_up_proj": (16, 3),
        "experts.gate_up_proj_bias": (16, 1),
        "up.weight": (6, 2 * 2 * 2),
        "up.bias": (6, 1),
        "up_one.weight": (5, 8),
        "up_one.bias": (5, 1),
        "out.weight": (2, 3),
        "out.bias": (2, 1),
    }
    selection = gradsel.select(model, None, None, gradsel.Rows(3), "magnitude", kinds={"bias": "rank"})
    expected = experts.gate_up_proj_bias.detach().abs().view(-1).topk(3).indices.sort().values
    assert torch.equal(selection["experts.gate_up_proj_bias"].entries(), expected)


def test_bare_projections_multiply_from_the_right():
    """CLIP's own text_projection and proj are [in, out], and only their names say so."""
    visual = Holder(proj=nn.Parameter(torch.randn(6, 4)), conv=nn.Conv2d(3, 6, 2))
    model = Holder(visual=visual, text_projection=nn.Parameter(torch.randn(5, 4)), proj=nn.Linear(6, 4))
    sizes = ranked_sizes(model)
    assert sizes["visual.proj"] == (4, 6)
    assert sizes["text_projection"] == (4, 5)
    assert sizes["proj.weight"] == (4, 6)


def test_parametrised_convolutions_are_no_experts():
    model = Holder(conv=weight_norm(nn.Conv1d(3, 5, 2)))
    assert ranked_sizes(model)["conv.parametrizations.weight.original1"] == (5, 6)


# --- The head ----------------------------------------------------------------------------------------------------


def heads(model: nn.Module, **options) -> list[str]:
    return [name for name, rule in parameter_rules(model, **options).items() if rule.reason == "head"]


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.decoder = Holder(out=nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
        self.readout = nn.Parameter(torch.randn(3, 2))
        self.overhead = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.overhead(self.body(x)) @ self.readout


def test_a_head_may_be_nested_or_a_bare_parameter():
    model = Prompted()
    assert heads(model) == []  # "overhead" is not a head
    assert heads(model, head=["readout"]) == ["readout"]
    inside = ["decoder.out.0.weight", "decoder.out.0.bias", "decoder.out.2.weight", "decoder.out.2.bias"]
    assert heads(model, head=["decoder"]) == inside  # its norm is a norm
    assert heads(model, head=["decoder.out"]) == inside
    assert heads(model, head=["out.2", "readout"]) == ["readout", "decoder.out.2.weight", "decoder.out.2.bias"]
    assert heads(wrapped(model, "_orig_mod"), head=["decoder.out.0"]) == inside[:2]
    selection = gradsel.select(model, [torch.randn(4, 3)], lambda m, x: m(x).square().sum(), head=["readout"])
    assert selection["readout"].kind == "whole"
    bare = Holder(head=nn.Parameter(torch.randn(3, 2)), body=nn.Linear(3, 3))
    assert heads(bare) == ["head"]


def test_a_head_that_is_not_there():
    model = Prompted()
    assert parameter_rules(model, head=HEAD) == parameter_rules(model, head=[])
    with pytest.raises(ValueError, match=r"head=\['redout'\].*readout"):
        parameter_rules(model, head=["redout"])
    assert heads(model, head=["nowhere", "readout"]) == ["readout"]  # it is enough that one of several exists


def test_a_lone_string_is_one_name():
    model = Flat()
    assert heads(model, head="head") == ["head.weight", "head.bias"]
    assert actions(model, freeze="blocks.*")["blocks.0.fc1.weight"] == "freeze"
    with pytest.raises(ValueError, match=r"rank='bloks\.\*'"):
        parameter_rules(model, rank="bloks.*")


def test_gemmas_projection_of_images_is_stored_with_inputs_first():
    config = hf.Gemma3Config(
        text_config={"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"hidden_size": 4, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
    )
    model = Gemma3MultiModalProjector(config)
    assert model.mm_input_projection_weight.shape == (4, 6)
    assert ranked_sizes(model) == {"mm_input_projection_weight": (6, 4)}
    assert actions(model)["mm_soft_emb_norm.weight"] == "freeze"
