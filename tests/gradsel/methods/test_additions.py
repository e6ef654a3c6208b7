"""What methods train on every layout of a vision model, what those that add something make of it, and that their
results are the same model elsewhere, merged or not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from gradsel.methods import METHODS, Context, method
from gradsel.methods.additions import (
    NAME,
    LowRank,
    ScaleShift,
    addition_parameters,
    additions_in,
    merge_additions,
    place,
)
from tests.gradsel.methods.cases import CONVNEXTS, SWINS, VISION, VITS, logits, own_vit, resnet, timm_swin, train
from tests.support import tiny

#: Every method of the registry.
HOWS = {
    "adapter": method("adapter"),
    "adapter behind both": method("adapter", bottleneck=5, places="both"),
    "vpt-shallow": method("vpt-shallow", prompts=3),
    "vpt-deep": method("vpt-deep", prompts=3),
    "ssf": method("ssf"),
    "spt-adapter": method("spt-adapter", budget=900, rank=1),
    "spt-lora": method("spt-lora", budget=900, rank=1),
    "lora": method("lora", rank=2),
    "lora on attention": method("lora", rank=2, layers="attention"),
    "shira": method("shira", rank=2),
    "miss": method("miss", rank=3),
    "paca": method("paca", columns=2),
    "gps": method("gps"),
    "gps by mass": method("gps", k=2, scope="mass"),
    "grft": method("grft", rows=2, anchor=1e-2),
    "grft columns": method("grft", columns=1),
    "grft sparse": method("grft", sparse=1),
    "full": method("full"),
    "linear": method("linear"),
    "bias": method("bias"),
}
NO_ATTENTION = ("adapter behind both", "vpt-shallow", "vpt-deep", "lora on attention")


#: Whatever the layout: three of them will do.
ANYWHERE = {
    "lora", "shira", "miss", "paca", "gps", "gps by mass", "grft", "grft columns", "grft sparse", "full", "linear",
    "bias",
}  # fmt: skip


def fits(name, layout):
    if layout == "own ViT" and not name.startswith("vpt"):  # as timm's
        return False
    if name in ANYWHERE and layout not in ("timm ViT", "HF Swin", "timm ConvNeXt"):
        return False
    if layout in SWINS:
        return name != "vpt-shallow"
    return layout in VITS or name not in NO_ATTENTION


def test_every_method_is_tried_here():
    assert {how.name for how in HOWS.values()} == METHODS.keys()


PAIRS = [(name, layout) for layout in VISION for name in HOWS]
FITTING = [pair for pair in PAIRS if fits(*pair)]
IDS = " on ".join


@pytest.mark.parametrize(("name", "layout"), FITTING, ids=map(IDS, FITTING))
def test_trains_what_it_says_and_its_result_is_the_same_model_elsewhere(name, layout, tmp_path):
    how, make, batches = HOWS[name], VISION[layout], tiny.images()
    model = make()
    before = copy.deepcopy(model.state_dict())
    prepared = how.prepare(model, batches, Context(seed=1))
    assert prepared.trained == sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert prepared.total == sum(p.numel() for p in make().parameters())
    beginning = {key: p.detach().clone() for key, p in prepared.model.named_parameters() if p.requires_grad}
    train(how, prepared.model, [*batches, batches[0]])
    for key, parameter in prepared.model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, beginning[key]), f"{key} has not moved"
    after = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for key, tensor in prepared.model.state_dict().items()
    }
    chosen = prepared.selection or {}  # full fine-tuning has none
    assert chosen or prepared.trained == prepared.total
    for key, old in before.items():
        if key in chosen and key in after:  # PEFT keeps the old head beside the new one
            mask = chosen[key].to_dense()
            assert torch.equal(after[key][~mask], old[~mask]), f"{key} has moved"

    how.save(prepared, tmp_path)
    loaded = how.load(make(), tmp_path)
    prepared.model.eval(), loaded.eval()
    with torch.no_grad():
        expected = logits(prepared.model, batches[1])
        assert torch.equal(logits(loaded, batches[1]), expected)
        assert not torch.equal(logits(make(), batches[1]), expected)
        assert torch.equal(logits(copy.deepcopy(prepared.model), batches[1]), expected)


MERGED = [
    pair
    for pair in FITTING
    if pair[0] in ("ssf", "spt-lora", "lora", "shira", "miss", "paca", "gps", "gps by mass", "grft", "grft columns")
    and pair[1] in ("timm ViT", "HF Swin", "timm ConvNeXt")
]


@pytest.mark.parametrize(("name", "layout"), MERGED, ids=map(IDS, MERGED))
def test_merged_computes_the_same_as_a_plain_model(name, layout):
    how, make, batches = HOWS[name], VISION[layout], tiny.images()
    prepared = how.prepare(make(), batches)
    train(how, prepared.model, batches, rate=3e-2)
    model = prepared.model.eval()
    with torch.no_grad():
        expected = logits(model, batches[0])
        merged = how.merge(model)
        torch.testing.assert_close(logits(merged, batches[0]), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(make(), batches[0]), expected, rtol=1e-2, atol=1e-2)
    plain = make()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(merged.state_dict())  # nothing is left beside the weights
    with torch.no_grad():
        assert torch.equal(logits(plain, batches[0]), logits(merged, batches[0]))


def test_a_text_model_takes_what_needs_no_image():
    for name in ("adapter behind both", "ssf", "spt-adapter", "spt-lora"):
        how = HOWS[name]
        prepared = how.prepare(tiny.bert(), tiny.texts())
        batch = tiny.texts()[1]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        F.cross_entropy(prepared.model(**inputs).logits, batch["labels"]).backward()
        added = [p for _, _, addition in additions_in(prepared.model) for p in addition.parameters()]
        assert added
        assert all(parameter.grad is not None for parameter in added), name


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        *((name, make, "has no (attention|layers of queries)") for name in NO_ATTENTION for make in CONVNEXTS.values()),
        ("vpt-shallow", timm_swin, "vpt-shallow adds tokens without a place.*; take vpt-deep for Swin"),
        ("vpt-deep", tiny.bert, "vpt-deep prompts vision transformers, and BertForSequenceClassification has no patch"),
        ("vpt-deep", resnet, "vpt-deep adds tokens for attention to see, but ResNet has no attention"),
        ("adapter", resnet, "ResNet has no linear layer in its block layer1.0"),
        ("shira", resnet, "shira adapts nn.Linear alone"),
        ("miss", resnet, "miss adapts nn.Linear alone"),
        ("lora on attention", resnet, "layers is 'attention', but ResNet has no layers of queries and values"),
        ("ssf", lambda: nn.ModuleDict({"head": nn.Linear(2, 2)}), "ssf goes behind .* that have a bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(name, make, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        HOWS[name].prepare(model, tiny.images())
    assert before.keys() == model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_torchs_own_attention_is_refused_because_it_does_not_call_its_output_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer]), "head": nn.Linear(8, 3)})
    for name in ("ssf", "adapter", "spt-lora"):
        with pytest.raises(ValueError, match=f"{name} cannot be added to ModuleDict: blocks.0.self_attn is"):
            HOWS[name].prepare(model, [])


@pytest.mark.parametrize("make", [lambda layer: LowRank(layer, 2), lambda layer: ScaleShift(5, False)])
def test_layers_that_store_their_weight_transposed_are_merged_as_others(make):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 4))  # 4 inputs, 5 outputs
    place(model, {"0": lambda: make(model[0])})
    for parameter in addition_parameters(model).values():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(merge_additions(model)(x), expected)


# --- What the additions compute ----------------------------------------------------------------------------------


def test_adapters_begin_as_the_identity_and_are_what_their_paper_says():
    batch = tiny.images()[0]
    for layout in ("own ViT", "HF ViT", "timm Swin", "timm ConvNeXt"):
        model = VISION[layout]()
        before = logits(model, batch)
        method("adapter", bottleneck=4).prepare(model)
        assert torch.equal(logits(model, batch), before), layout
    model = own_vit()
    method("adapter", bottleneck=4).prepare(model)
    fc2 = model.blocks[0].mlp.fc2
    adapter = fc2.get_submodule(NAME)
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(2, 5, 96)
    plain = F.linear(x, fc2.weight, fc2.bias)
    hidden = F.gelu(plain @ adapter.down.weight.t() + adapter.down.bias)
    torch.testing.assert_close(fc2(x), plain + hidden @ adapter.up.weight.t() + adapter.up.bias)


def test_scale_and_shift_begin_near_the_identity_behind_every_operation():
    model = tiny.vit()
    method("ssf").prepare(model)
    found = {path: addition for path, _, addition in additions_in(model)}
    inside = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert set(found) == {"patch_embed.proj", "norm", *(f"blocks.{i}.{name}" for i in (0, 1) for name in inside)}
    scales = torch.cat([addition.scale for addition in found.values()])
    shifts = torch.cat([addition.shift for addition in found.values()])
    assert 0.015 < scales.std() < 0.025
    assert abs(scales.mean() - 1) < 0.005
    assert 0.015 < shifts.std() < 0.025
    assert abs(shifts.mean()) < 0.005


class Prompted(nn.Module):
    """VPT in plain torch, with the prompts after the class token as in its paper."""

    def __init__(self, model, prompts):
        super().__init__()
        self.model, self.prompts = model, prompts

    def forward(self, images):
        model = self.model
        tokens = model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + model.pos_embed
        others = 1
        for number, block in enumerate(model.blocks):
            if number < len(self.prompts):
                own = self.prompts[number].expand(len(tokens), -1, -1)
                tokens = torch.cat([tokens[:, :1], own, tokens[:, others:]], dim=1)
                others = 1 + own.shape[1]
            tokens = block(tokens)
        return model.head(model.norm(tokens[:, 0].contiguous()))


@pytest.mark.parametrize("name", ["vpt-shallow", "vpt-deep"])
def test_prompts_are_what_their_paper_says(name):
    images = tiny.images()[0]["pixel_values"]
    model = own_vit()
    method(name, prompts=5).prepare(model)
    prompts = [parameter for _, _, addition in additions_in(model) for parameter in addition.parameters()]
    assert len(prompts) == (1 if name == "vpt-shallow" else 2)
    bound = math.sqrt(6 / (3 * 8 * 8 + 24))
    assert 0.8 * bound < max(tokens.abs().max() for tokens in prompts) <= bound
    torch.testing.assert_close(model(images), Prompted(own_vit(), prompts)(images))
    nn.init.normal_(prompts[-1], std=3.0)
    torch.testing.assert_close(model(images), Prompted(own_vit(), prompts)(images))


@pytest.mark.parametrize("layout", SWINS)
def test_prompts_join_every_window_of_swin(layout):
    """Against attention written out: prompts are further keys and values, without relative positions or mask."""
    model = VISION[layout]()
    method("vpt-deep", prompts=3).prepare(model)
    attention, block = next(
        (part, model.get_submodule(path.rpartition(".")[0])) for path, part, _ in additions_in(model)
    )
    tokens = attention.get_submodule(NAME).tokens
    nn.init.normal_(tokens)
    torch.manual_seed(2)
    windows = torch.randn(8, 16, 12)
    mask = torch.zeros(4, 16, 16)
    mask[1, :8, 8:] = -100.0
    norm = block.norm1 if layout == "timm Swin" else block.layernorm_before
    everything = torch.cat([windows, norm(tokens).expand(8, -1, -1)], dim=1)
    if layout == "timm Swin":
        q, k, v = F.linear(everything, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
        found, out = attention(windows, mask=mask), attention.proj
        bias = type(attention)._get_rel_pos_bias(attention)
    else:
        q, k, v = (part(everything) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        found, out = attention(windows, mask)[0], attention.o_proj
        bias = type(attention.relative_position_bias).forward(attention.relative_position_bias)
    q, k, v = (part.view(8, 19, 2, 6).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(6)
    scores[:, :, :16, :16] += bias + mask.repeat(2, 1, 1).unsqueeze(1)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(8, 19, 12)
    torch.testing.assert_close(found, out(mixed[:, :16]))


# --- Files and mistakes ------------------------------------------------------------------------------------------


def test_additions_of_another_model_are_refused(tmp_path):
    how = method("adapter")
    prepared = how.prepare(tiny.vit(), None)
    how.save(prepared, tmp_path)
    file = tmp_path / "additions.safetensors"
    saved = load_file(file)
    first = next(iter(saved))
    save_file({name: tensor for name, tensor in saved.items() if name != first}, file)
    with pytest.raises(ValueError, match=f"is of another model: 1 names differ, first {first}"):
        how.load(tiny.vit(), tmp_path)
    save_file({**saved, first: torch.zeros(7)}, file)
    with pytest.raises(ValueError, match=rf"{first} is \[7\] in"):
        how.load(tiny.vit(), tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"additions.safetensors is missing"):
        how.load(tiny.vit(), tmp_path)


def test_what_is_not_linear_cannot_be_merged():
    for name in ("adapter", "vpt-deep", "spt-adapter"):
        prepared = HOWS[name].prepare(tiny.vit(), tiny.images())
        before = prepared.model.state_dict().keys()
        with pytest.raises(ValueError, match=f"{name} cannot be merged"):
            HOWS[name].merge(prepared.model)
        assert prepared.model.state_dict().keys() == before


def test_initial_values_depend_on_the_seed_alone():
    def values(seed, before):
        model = tiny.vit()
        torch.manual_seed(before)
        state = torch.get_rng_state()
        method("ssf").prepare(model, None, Context(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for _, _, addition in additions_in(model) for p in addition.parameters()])

    assert torch.equal(values(1, before=3), values(1, before=4))
    assert not torch.equal(values(1, before=3), values(2, before=3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adapter", {"bottleneck": 0}, "bottleneck must be an integer >= 1, got 0"),
        ("adapter", {"places": "bth"}, "places is 'bth', expected one of mlp, both; did you mean both"),
        ("vpt-deep", {"prompts": 0}, "prompts must be an integer >= 1, got 0"),
        ("spt-lora", {"budget": 0}, "budget must be an integer >= 1, got 0"),
        ("spt-adapter", {"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ("lora", {"layers": "attn"}, "layers is 'attn', expected one of all, attention"),
        ("shira", {"rank": 0}, "rank must be an integer >= 1"),
        ("paca", {"columns": 0}, "k >= 1, got 0"),
        ("gps", {"scope": "nets"}, "scope is 'nets', expected one of neuron, mass, layer, net; did you mean net"),
        ("gps", {"scope": "net", "columns": 3}, "columns is for scope='neuron', got scope='net'"),
        ("gps", {"skip_blocks": 3}, "skip_blocks must be a list of numbers of blocks, got 3"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        method(name, **options)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"shira of rank 50 does not fit blocks.0.attn.qkv; .* at most 18"):
        method("shira", rank=50).prepare(tiny.vit())
    with pytest.raises(ValueError, match=r"miss of rank 25 does not fit blocks.0.attn.qkv; .* at most 24"):
        method("miss", rank=25).prepare(tiny.vit())
