"""Deltas by the names in a model and by those in its checkpoints: either fits both."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import gradsel
from gradsel.cli import main as cli
from gradsel.delta.checkpoints import Checkpoint
from gradsel.delta.fitting import Destination, fitted
from gradsel.delta.making import differing
from gradsel.delta.parts import same_bits
from gradsel.delta.sites import originals_in, sites_of
from gradsel.parameters import checkpoint_names

transformers = pytest.importorskip("transformers", minversion="5")

FILE = "model.safetensors"
TEXT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
#: The last two split tensors of their checkpoints: query, key and value; and the halves of a gated linear layer.
NAMES = ["ViT", "Swin", "Llama", "tied GPT-2", "Mixtral", "LLaVA", "Nomic BERT", "DINOv2"]


def made(name):
    """A small model with fixed weights, in eval mode."""
    torch.manual_seed(0)
    if name == "ViT":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))
    elif name == "Swin":
        config = transformers.SwinConfig(
            image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=3
        )
        model = transformers.SwinForImageClassification(config)
    elif name == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    elif name == "tied GPT-2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "Mixtral":
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)
        )
    elif name == "Nomic BERT":
        config = transformers.NomicBertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.NomicBertForMaskedLM(config)
    elif name == "DINOv2":
        config = transformers.Dinov2Config(**VISION, use_swiglu_ffn=True, num_labels=3)
        model = transformers.Dinov2ForImageClassification(config)
    else:
        vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16)
        text = transformers.LlamaConfig(**TEXT)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
        model = transformers.LlavaForConditionalGeneration(config)
    return model.eval()


def batch(name):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    tokens = torch.randint(2, 49, (4, 8), generator=generator)
    if name in ("ViT", "Swin", "DINOv2"):
        return {"pixel_values": images}
    if name == "LLaVA":
        tokens[:, :4] = 49  # 4 patches
        return {"input_ids": tokens, "pixel_values": images}
    return {"input_ids": tokens}


def loss(model, inputs):
    logits = model(**inputs).logits.flatten(0, -2)
    return F.cross_entropy(logits, torch.arange(len(logits)) % 3)


def logits(model, name):
    with torch.no_grad():
        return model(**batch(name)).logits


def tuned(name):
    """The base; the model attached and trained; and the same model plain."""
    base, model = made(name), made(name)
    gradsel.attach(model, gradsel.select(model, [batch(name)], loss, gradsel.PerNeuron(1)))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch(name)).backward()
        optimizer.step()
    return base, model, gradsel.detach(copy.deepcopy(model))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """The name of a model, and a folder with its checkpoints before and after training and the deltas between them."""
    folder = tmp_path_factory.mktemp("case")
    base, model, plain = tuned(request.param)
    base.save_pretrained(folder / "base")
    plain.save_pretrained(folder / "tuned")
    base.save_pretrained(folder / "base sharded", max_shard_size="12KB")
    plain.save_pretrained(folder / "tuned sharded", max_shard_size="12KB")
    gradsel.Delta.of(model).save(folder / "task.delta", originals=True)
    assert run("make", folder / "base", folder / "tuned", folder / "made.delta", "--with-originals") == 0
    return request.param, folder


def run(*arguments):
    return cli.main(["delta", *map(str, arguments)])


def require_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["", " sharded"])
@pytest.mark.parametrize("delta", ["task", "made"])
def test_a_checkpoint_gets_what_saving_the_trained_model_writes(case, delta, kind, tmp_path):
    _, folder = case
    base, trained = folder / f"base{kind}", folder / f"tuned{kind}"
    assert bool(kind) == (base / "model.safetensors.index.json").exists()
    for target in ("out", "back"):
        (tmp_path / target).mkdir()
    assert run("apply", folder / f"{delta}.delta", base, tmp_path / "out") == 0
    require_same(Checkpoint(tmp_path / "out"), Checkpoint(trained))
    assert run("revert", folder / f"{delta}.delta", tmp_path / "out", tmp_path / "back") == 0
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_a_delta_of_checkpoints_fits_the_model(case, loaded):
    name, folder = case
    base = made(name)
    if loaded:
        base = type(base).from_pretrained(folder / "base").eval()
    before = copy.deepcopy(base.state_dict())
    after = type(base).from_pretrained(folder / "tuned").eval()
    delta = gradsel.Delta.load(folder / "made.delta")
    delta.check(base)
    applied = gradsel.load_delta(base, delta)
    require_same(base.state_dict(), after.state_dict())
    assert torch.equal(logits(base, name), logits(after, name))
    applied.revert_()
    require_same(base.state_dict(), before)
    with delta.applied(base):
        require_same(base.state_dict(), after.state_dict())
    require_same(base.state_dict(), before)
    with pytest.raises(ValueError, match="not those that the delta was made on"):
        delta.apply_(after)


def test_the_base_of_a_delta_may_be_a_checkpoint(case):
    name, folder = case
    after = type(made(name)).from_pretrained(folder / "tuned")
    delta = gradsel.Delta.of(after, base=load_file(folder / "base" / FILE))
    assert delta == gradsel.Delta.of(after, base=made(name))


def test_training_goes_on_with_a_delta_of_checkpoints(case):
    name, folder = case
    model = made(name)
    delta = gradsel.Delta.load(folder / "made.delta")
    gradsel.attach(model, delta.selection(model))
    gradsel.load_delta(model, delta)
    expected = type(model).from_pretrained(folder / "tuned").state_dict()
    require_same(gradsel.detach(model).state_dict(), expected)


def test_a_bank_has_tasks_by_either_names(case):
    name, folder = case
    base = made(name)
    before = copy.deepcopy(base.state_dict())
    bank = gradsel.TaskBank(base)
    bank.add("task", folder / "task.delta")
    bank.activate("task")
    bank.add("made", folder / "made.delta")
    after = type(base).from_pretrained(folder / "tuned").state_dict()
    for task in ("made", "task", "made", "task"):
        bank.activate(task)
        require_same(base.state_dict(), after)
    found = next(iter(bank.overlap(whole=True).values()))
    assert found.shared == found.b
    bank.activate(None)
    require_same(base.state_dict(), before)


def test_diff_compares_by_the_names_of_the_model(case, tmp_path, capsys):
    _, folder = case
    set_by_both = str(gradsel.Delta.load(folder / "made.delta").trainable_count())
    shutil.copyfile(folder / "made.delta", tmp_path / "made.delta")
    shutil.copyfile(folder / "base" / "config.json", tmp_path / "config.json")
    for other in ((folder / "made.delta", "--model", folder / "base"), (tmp_path / "made.delta",)):
        capsys.readouterr()
        assert run("diff", folder / "task.delta", *other) == 0
        total = capsys.readouterr().out.splitlines()[-1].replace(",", "").split()
        assert total[-3:] == [set_by_both, set_by_both, "0"]


def test_diff_says_that_it_may_need_the_model(small, capsys):
    _, folder = small
    assert run("make", folder / "base", folder / "tuned", folder / "made.delta") == 0
    assert run("diff", folder / "task.delta", folder / "made.delta") == 0
    assert "pass --model FOLDER" in capsys.readouterr().out


def test_another_checkpoint_is_refused(case, tmp_path, capsys):
    name, folder = case
    torch.manual_seed(1)
    other = type(made(name))(made(name).config)
    other.save_pretrained(tmp_path / "other")
    for delta in ("task", "made"):
        assert run("apply", folder / f"{delta}.delta", tmp_path / "other", tmp_path / "out") == 1
        assert "not those that the delta was made on" in capsys.readouterr().err
    wrong = made("Llama" if name != "Llama" else "ViT")
    wrong.save_pretrained(tmp_path / "wrong")
    assert run("apply", folder / "task.delta", tmp_path / "wrong", tmp_path / "out") == 1
    assert "it was made for another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"not those that the delta was made on"):
        gradsel.load_delta(other, folder / "made.delta")
    with pytest.raises(ValueError, match="it was made for another model"):
        gradsel.load_delta(wrong, folder / "made.delta")


def test_force_writes_to_another_base(case, tmp_path):
    name, folder = case
    base = load_file(folder / "base" / FILE)
    torch.manual_seed(1)
    other = type(made(name))(made(name).config)
    other.save_pretrained(tmp_path / "other")
    assert run("apply", folder / "task.delta", tmp_path / "other", tmp_path / "out", "--force") == 0
    trained, out = load_file(folder / "tuned" / FILE), load_file(tmp_path / "out" / FILE)
    for tensor in out:
        changed = trained[tensor] != base[tensor]
        assert torch.equal(out[tensor][changed], trained[tensor][changed])


@pytest.fixture
def small(tmp_path):
    """A ViT, and a folder with its checkpoint and the delta of one of its weights."""
    base = made("ViT")
    changed = copy.deepcopy(base)
    changed.vit.layers[0].attention.q_proj.weight.data[0, 0] += 1
    gradsel.Delta.of(changed, base=base).save(tmp_path / "task.delta", originals=True)
    base.save_pretrained(tmp_path / "base")
    changed.save_pretrained(tmp_path / "tuned")
    return changed, tmp_path


IN_MODEL = "vit.layers.0.attention.q_proj.weight"
IN_CHECKPOINT = "vit.encoder.layer.0.attention.attention.query.weight"


def test_messages_say_which_name_stands_for_which(small, capsys):
    changed, folder = small
    assert run("make", folder / "base", folder / "tuned", folder / "made.delta") == 0
    assert run("apply", folder / "task.delta", folder / "tuned", folder / "out") == 1
    assert f"({IN_CHECKPOINT} is {IN_MODEL} in the delta)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not those that the delta was made on") as error:
        gradsel.load_delta(changed, folder / "made.delta")
    assert f"({IN_MODEL} is {IN_CHECKPOINT} in the delta)" in str(error.value)
    for delta, line in (("task", f"{IN_MODEL}: {IN_CHECKPOINT}"), ("made", f"{IN_CHECKPOINT}: {IN_MODEL}")):
        assert run("info", folder / f"{delta}.delta", "--model", folder / "base") == 0
        assert line in capsys.readouterr().out.splitlines()


def test_the_config_may_be_elsewhere(small, tmp_path, capsys):
    _, folder = small
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / FILE
    (folder / "base" / FILE).rename(alone)
    command = ("apply", folder / "task.delta", alone, tmp_path / "out.safetensors")
    assert run(*command) == 1
    assert "it was made for another model" in capsys.readouterr().err
    assert run(*command, "--model", folder / "base") == 0
    require_same(load_file(tmp_path / "out.safetensors"), load_file(folder / "tuned" / FILE))
    (folder / "base" / "config.json").rename(folder / "config.json")
    assert run(*command) == 0


def test_without_transformers_the_message_says_what_is_missing(small, monkeypatch, capsys):
    _, folder = small
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("apply", folder / "task.delta", folder / "base", folder / "out") == 1
    assert "translating them needs transformers 5" in capsys.readouterr().err


def test_names_in_both_directions(tmp_path):
    made("Mixtral").save_pretrained(tmp_path)
    names = checkpoint_names.of_folder(tmp_path, Checkpoint(tmp_path).shapes)
    stacked, single = "model.layers.1.mlp.experts.down_proj", "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert names.to_checkpoint(stacked) == tuple(single.format(number) for number in range(3))
    assert names.to_model(single.format(2)) == (stacked,)
    assert names.to_checkpoint("no.such.weight") == names.to_model("no.such.weight") == ()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    assert checkpoint_names.of_folder(tmp_path, {}) is None


def test_prefix_of_the_base_model(tmp_path):
    """A delta of a model without a head, or of its checkpoints, fits one with a head."""
    whole = made("ViT")
    whole.save_pretrained(tmp_path / "whole")
    bare = copy.deepcopy(whole.vit)
    bare.save_pretrained(tmp_path / "bare")
    changed = copy.deepcopy(bare)
    changed.layers[0].attention.q_proj.weight.data[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    gradsel.Delta.of(changed, base=bare).save(tmp_path / "bare.delta")
    assert run("apply", tmp_path / "bare.delta", tmp_path / "whole", tmp_path / "out") == 0
    found = load_file(tmp_path / "out" / FILE)["vit.encoder.layer.0.attention.attention.query.weight"]
    assert torch.equal(found, changed.layers[0].attention.q_proj.weight)
    assert run("make", tmp_path / "bare", tmp_path / "changed", tmp_path / "made.delta") == 0
    gradsel.load_delta(whole, tmp_path / "made.delta")
    assert torch.equal(whole.vit.layers[0].attention.q_proj.weight, changed.layers[0].attention.q_proj.weight)


def test_checkpoints_without_the_prefix_of_the_base_model(tmp_path):
    """GPT-2 was published like this."""
    base, model, plain = tuned("tied GPT-2")
    gradsel.Delta.of(model).save(tmp_path / "task.delta")
    base.save_pretrained(tmp_path)
    save_file({name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}, tmp_path / FILE)
    assert run("apply", tmp_path / "task.delta", tmp_path, tmp_path / "out.safetensors") == 0
    require_same(load_file(tmp_path / "out.safetensors"), plain.transformer.state_dict())


@pytest.mark.parametrize("name", ["ViT", "Llama"])
def test_make_compares_checkpoints_with_different_names(name, tmp_path):
    base, _, plain = tuned(name)
    base.save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "tuned", save_original_format=False)
    assert run("make", tmp_path / "base", tmp_path / "tuned", tmp_path / "made.delta") == 0
    gradsel.load_delta(base, tmp_path / "made.delta")
    require_same(base.state_dict(), plain.state_dict())


def test_layouts_are_not_mixed_up(tmp_path, capsys):
    base, _, plain = tuned("Mixtral")
    base.save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "tuned", save_original_format=False)
    assert run("make", tmp_path / "base", tmp_path / "tuned", tmp_path / "made.delta") == 1
    message = capsys.readouterr().err
    assert "has another layout in the base" in message
    assert "model.layers.0.block_sparse_moe.experts.0.w" in message
    assert "model.layers.0.mlp.experts" in message


class Swapped:
    """The names of a model whose ``a`` is the ``b`` of its checkpoints, and the other way around."""

    def __init__(self):
        self.model = self.checkpoint = {"a": (4,), "b": (4,)}

    def group(self, name, into):
        other = {"a": "b", "b": "a"}[name]
        here, there = (name, other) if into == "model" else (other, name)
        return checkpoint_names.Group(there, {here: (4,)})


def test_the_base_shows_which_of_two_meanings_a_name_has():
    base = {"a": torch.arange(4.0), "b": torch.arange(4.0, 8.0)}
    part = differing("a", base["a"], base["a"] + torch.tensor([0.0, 1, 0, 0]))

    def fit(tensors, force):
        there = Destination("model", lambda parts: Swapped(), tensors.__getitem__)

        def attempt(parts, force):
            sites = sites_of(parts, tensors, force)
            originals_in(sites, force)
            return [site.name for site in sites]

        return fitted({"a": part}, there, force, attempt)

    other = {"a": torch.zeros(4), "b": torch.zeros(4)}
    for force in (False, True):
        assert fit(base, force) == ["a"]
        assert fit({"a": base["b"], "b": base["a"]}, force) == ["b"]
        with pytest.raises(ValueError, match="a in the delta may also stand for b here, and as the base shows"):
            fit(other, force)
