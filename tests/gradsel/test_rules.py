"""What the rules make of kinds, blocks, patterns, heads, shared parameters and names that nobody expects."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

import gradsel
from gradsel.parameters.blocks import block_names
from gradsel.parameters.names import strip_wrappers
from gradsel.parameters.rules import HEAD, KINDS, parameter_rules, ranked_sizes


class Every(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(3, 4)
        self.classifier = nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.ones(4))
        self.rel_pos_h = nn.Parameter(torch.randn(5, 2))
        self.norm = nn.LayerNorm(4)
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.words = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.sinks = nn.Parameter(torch.randn(4))


OF_KIND = {
    "weight": ["proj_in.weight"],
    "bias": ["proj_in.bias"],
    "head": ["classifier.weight", "classifier.bias"],
    "layer scale": ["gamma"],
    "position table": ["rel_pos_h"],
    "normalisation": ["norm.weight", "norm.bias"],
    "position embedding": ["pos_embed"],
    "token": ["cls_token"],
    "embedding": ["words.weight"],
    "output embedding": ["lm_head.weight"],
    "other": ["sinks"],
}


def actions(model: nn.Module, **options) -> dict[str, str]:
    return {name: rule.action for name, rule in parameter_rules(model, **options).items()}


def with_action(model: nn.Module, action: str, **options) -> list[str]:
    return [name for name, found in actions(model, **options).items() if found == action]


class Holder(nn.Module):
    """A module with these parts."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


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
        ({"normalization": "whole"}, "kinds names 'normalization', expected one of .*did you mean normalisation"),
        ({"wait": "whole"}, "did you mean weight"),
        ({"bias": "frozen"}, r"kinds\['bias'\] is 'frozen', expected one of rank, whole, freeze"),
        ({"xyz": "whole"}, "kinds names 'xyz', expected one of weight, bias, head, [^?]*$"),
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
        (PromptEmbeddings(), {"weight": "embedding"}),  # frozen, but not without a word
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
    """CLIP's logit_scale: one number is no layer of neurons."""
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
    """CLIP's own text_projection and proj are [in, out], and nothing but their names says so."""
    visual = Holder(proj=nn.Parameter(torch.randn(6, 4)), conv=nn.Conv2d(3, 6, 2))
    model = Holder(visual=visual, text_projection=nn.Parameter(torch.randn(5, 4)), proj=nn.Linear(6, 4))
    sizes = ranked_sizes(model)
    assert sizes["visual.proj"] == (4, 6)
    assert sizes["text_projection"] == (4, 5)
    assert sizes["proj.weight"] == (4, 6)


def test_parametrised_convolutions_are_no_experts():
    model = Holder(conv=weight_norm(nn.Conv1d(3, 5, 2)))
    assert ranked_sizes(model)["conv.parametrizations.weight.original1"] == (5, 6)


# --- Blocks ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)


class Unit(nn.Module):
    """A convolution with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Unit(), Unit(), Unit())


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))


class Flat(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(3, 2)


STACKS = {
    "a flat stack": (Flat, ["blocks.0", "blocks.1", "blocks.2"]),
    "stages": (
        lambda: Holder(stages=nn.ModuleList([Stage(1), Stage(2)])),
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"],
    ),
    "stages that are stacks themselves": (
        lambda: Holder(layers=nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(), Block()))),
        ["layers.0.0", "layers.1.0", "layers.1.1"],
    ),
    "layers of a ResNet": (
        lambda: Holder(
            layer1=nn.Sequential(Bottleneck(), Bottleneck()), layer2=nn.Sequential(Bottleneck()), fc=nn.Linear(3, 2)
        ),
        ["layer1.0", "layer1.1", "layer2.0"],
    ),
    "a model that is a stack": (lambda: nn.Sequential(Block(), Block()), ["0", "1"]),
    "units of a plain network": (lambda: Holder(features=nn.Sequential(Unit(), Unit())), ["features.0", "features.1"]),
    "lists in a list": (
        lambda: Holder(layers=nn.ModuleList(nn.ModuleList([Block(), Unit()]) for _ in range(2))),
        ["layers.0", "layers.1"],
    ),
    "no blocks": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), []),
    "layers without parts": (lambda: Holder(layers=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])), []),
}


@pytest.mark.parametrize("name", STACKS)
def test_block_names(name):
    make, expected = STACKS[name]
    model = make()
    assert block_names(model) == expected
    for number, path in enumerate(expected):  # the numbers count through all stages
        inside = [full for full in actions(model) if full.startswith(f"{path}.")]
        others = [full for full in actions(model) if full not in inside]
        for wanted in (number, number - len(expected)):
            kept = parameter_rules(model, blocks=[wanted])
            assert all(kept[full].reason != "block left out" for full in inside)
            assert all(kept[full].reason in ("block left out", "head") for full in others)
            skipped = parameter_rules(model, skip_blocks=[wanted])
            assert {full for full, rule in skipped.items() if rule.reason == "block left out"} == set(inside)


def test_blocks_keep_the_head_and_nothing_else():
    model = Flat()
    ranked = [f"blocks.2.{layer}.weight" for layer in ("fc1", "fc2")]
    model.blocks[0].head = nn.Linear(3, 3)  # a head inside a block
    assert with_action(model, "rank", blocks=[-1], head=["head"]) == ranked
    whole = with_action(model, "whole", blocks=[-1], head=["head"])
    assert whole == [
        "blocks.0.head.weight",
        "blocks.0.head.bias",
        "blocks.2.fc1.bias",
        "blocks.2.fc2.bias",
        "head.weight",
        "head.bias",
    ]
    assert actions(model, skip_blocks=[0])["blocks.0.head.weight"] == "freeze"  # to skip a block is to skip all of it
    assert with_action(model, "rank", blocks=[]) == []
    assert with_action(model, "whole", blocks=[], head=["head"])[-2:] == ["head.weight", "head.bias"]


def test_blocks_and_skip_blocks_together_and_under_patterns():
    model = Flat()
    options = {"blocks": [0, 1], "skip_blocks": [-2], "head": ["head"]}
    assert with_action(model, "rank", **options) == ["blocks.0.fc1.weight", "blocks.0.fc2.weight"]
    found = actions(model, **options, rank=["blocks.1.fc1.*"], whole=["stem.*"], freeze=["blocks.0.fc2.*", "head.bias"])
    assert [name for name, action in found.items() if action == "rank"] == [
        "blocks.0.fc1.weight",
        "blocks.1.fc1.weight",
        "blocks.1.fc1.bias",
    ]
    assert [name for name, action in found.items() if action == "whole"] == [
        "stem.weight",
        "stem.bias",
        "blocks.0.fc1.bias",
        "head.weight",
    ]
    assert parameter_rules(model, **options, rank=["blocks.1.*"])["blocks.1.fc1.bias"].named


@pytest.mark.parametrize("argument", ["blocks", "skip_blocks"])
@pytest.mark.parametrize("number", [3, -4])
def test_blocks_that_are_not_there(argument, number):
    with pytest.raises(ValueError, match=rf"{argument} names block {number}, but Flat has 3 blocks, blocks.0 to bloc"):
        parameter_rules(Flat(), **{argument: [0, number]})
    with pytest.raises(ValueError, match=rf"{argument} names block 0, but Linear has no repeated blocks"):
        parameter_rules(nn.Linear(2, 2), **{argument: [0]})


# --- Names -------------------------------------------------------------------------------------------------------


def test_shared_parameters_belong_to_all_their_blocks():
    model = Flat()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    assert "blocks.1.fc1.weight" not in parameter_rules(model)
    assert actions(model, blocks=[0])["blocks.0.fc1.weight"] == "rank"
    assert actions(model, blocks=[1])["blocks.0.fc1.weight"] == "rank"
    assert actions(model, blocks=[2])["blocks.0.fc1.weight"] == "freeze"
    assert actions(model, skip_blocks=[1])["blocks.0.fc1.weight"] == "freeze"  # block 1 would not be left alone
    assert actions(model, whole=["blocks.1.fc1.weight"])["blocks.0.fc1.weight"] == "whole"


def test_shared_modules_are_one_block():
    block = Block()
    model = Holder(layers=nn.ModuleList([block, block, Block()]))
    assert block_names(model) == ["layers.0", "layers.2"]
    assert len(with_action(model, "rank")) == 4
    assert actions(model, freeze=["layers.1.*"])["layers.0.fc1.weight"] == "freeze"


def wrapped(model: nn.Module, name: str) -> nn.Module:
    """As DistributedDataParallel, torch.compile and both name what is inside them."""
    for part in name.split("+"):
        model = checkpoint_wrapper(model) if part == "checkpoint" else Holder(**{part: model})
    return model


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_orig_mod+module", "module+_orig_mod", "checkpoint"])
def test_rules_do_not_depend_on_wrappers(name):
    plain, model = Flat(), wrapped(Flat(), name)
    options = {"blocks": [-1], "freeze": ["blocks.2.fc2.*"], "head": ["head"]}
    assert parameter_rules(model, **options) == parameter_rules(plain, **options)
    model = Flat()
    model.blocks[2] = wrapped(model.blocks[2], "checkpoint" if name == "checkpoint" else "_orig_mod")
    assert set(parameter_rules(model)) == set(parameter_rules(plain))


def test_a_compiled_model_has_the_rules_of_the_plain_one():
    model = Flat()
    assert parameter_rules(torch.compile(model), skip_blocks=[1]) == parameter_rules(model, skip_blocks=[1])


class Talking(nn.Module):
    """A language model that says which layer its output embedding is, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder


def test_the_output_embedding_is_found_inside_wrappers():
    for model in (Talking(), wrapped(Talking(), "module"), Holder(language_model=Talking())):
        reasons = {name.removeprefix("language_model."): r.reason for name, r in parameter_rules(model).items()}
        assert reasons == {
            "dense.weight": "weight",
            "dense.bias": "bias",
            "decoder.weight": "output embedding",
            "decoder.bias": "bias",
        }


def test_names_that_wrappers_would_make_equal_are_refused():
    model = Holder(module=nn.Linear(3, 3), weight=nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"module.weight and another parameter of Holder are both weight without"):
        parameter_rules(model)


def test_exotic_names():
    model = nn.Module()
    for name in ("with space", "brackets[0]", "ünïcode", "bias", "weight", "0"):
        model.register_module(name, nn.Linear(2, 2))
    rules = parameter_rules(model, freeze=["brackets[[]0].*"], whole=["with space.weight"])
    assert list(rules) == [name for name, _ in model.named_parameters()]
    assert rules["brackets[0].weight"].action == "freeze"
    assert rules["with space.weight"].action == "whole"
    assert rules["bias.weight"].action == rules["weight.weight"].action == rules["0.weight"].action == "rank"
    assert rules["weight.bias"].action == "whole"
    assert strip_wrappers("encoder.module.weight") == "encoder.module.weight"  # only a wrapper's comes first


def test_empty_and_complex_parameters_have_a_rule():
    model = Holder(
        none=nn.Linear(0, 3, bias=False),
        waves=nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)),
        linear=nn.Linear(2, 2),
    )
    rules = parameter_rules(model)
    assert (rules["waves"].action, rules["waves"].reason) == ("freeze", "complex64")
    selection = gradsel.select(model, None, None, criterion="magnitude")
    assert selection["none.weight"].nnz == 0
    assert selection["linear.weight"].nnz == 2


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
    assert heads(model) == []  # overhead is no head
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
    with pytest.raises(ValueError, match=r"head=\['redout'\] names no module or parameter of Prompted; did you mean"):
        parameter_rules(model, head=["redout"])
    assert heads(model, head=["nowhere", "readout"]) == ["readout"]  # one of several is enough


def test_a_lone_string_is_one_name():
    model = Flat()
    assert heads(model, head="head") == ["head.weight", "head.bias"]
    assert actions(model, freeze="blocks.*")["blocks.0.fc1.weight"] == "freeze"
    with pytest.raises(ValueError, match=r"rank='bloks\.\*' matches no parameter of Flat"):
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
