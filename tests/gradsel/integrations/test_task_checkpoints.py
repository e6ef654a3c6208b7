"""Checkpoints as users have them: of attached models, with new heads, in folders that from_pretrained loads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gradsel
from gradsel.cli import main as cli
from gradsel.delta.parts import same_bits
from gradsel.masks import Frozen, Whole

transformers = pytest.importorskip("transformers", minversion="5")

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ["ViT", "BERT"]


REST = {"ViT": {"image_size": 16, "patch_size": 8}, "BERT": {"vocab_size": 50, "max_position_embeddings": 32}}


def config(kind, labels, **changes):
    settings = {**SMALL, **REST[kind], "num_labels": labels, **changes}
    return transformers.ViTConfig(**settings) if kind == "ViT" else transformers.BertConfig(**settings)


def classes(kind):
    """The model without a head, and for classification."""
    names = (
        ("ViTModel", "ViTForImageClassification") if kind == "ViT" else ("BertModel", "BertForSequenceClassification")
    )
    return [getattr(transformers, name) for name in names]


def batch(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "ViT":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(2, 49, (4, 8), generator=generator)}


def logits(model, kind):
    with torch.no_grad():
        return model.eval()(**batch(kind)).logits


def attached(kind, folder, labels=3, seed=1):
    """A model for a task on the body in a folder, as from_pretrained makes it, attached and trained."""
    torch.manual_seed(seed)
    model = classes(kind)[1].from_pretrained(folder, num_labels=labels)
    inputs = {**batch(kind), "labels": torch.tensor([0, 1, 2, 0])}
    selection = gradsel.select(model, [inputs], lambda model, batch: model(**batch).loss, gradsel.PerNeuron(1))
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """A folder with ``body``, a model without a head; ``checkpoint-2`` of an attached model; and its ``task.delta``."""
    kind, folder = request.param, tmp_path_factory.mktemp("case")
    torch.manual_seed(0)
    body = classes(kind)[0](config(kind, 3))
    body.save_pretrained(folder / "body")
    body.save_pretrained(folder / "body sharded", max_shard_size="12KB")
    for base in ("body", "body sharded"):
        (folder / base / "tokenizer.json").write_text("{}")
    model = attached(kind, folder / "body")
    model.save_pretrained(folder / "checkpoint-2")
    gradsel.save_delta(model, folder / "task.delta")
    return kind, folder, gradsel.detach(model)


def run(*arguments):
    return cli.main(["delta", *map(str, arguments)])


def test_a_delta_loads_on_a_head_that_was_initialised_anew(case):
    kind, folder, trained = case
    torch.manual_seed(7)
    base = classes(kind)[1].from_pretrained(folder / "body", num_labels=3)
    before = copy.deepcopy(base.state_dict())
    assert not same_bits(base.classifier.weight, trained.classifier.weight)
    handle = gradsel.load_delta(base, folder / "task.delta")
    assert torch.equal(logits(base, kind), logits(trained, kind))
    handle.revert_()
    assert all(same_bits(base.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        next(iter(base.parameters())).view(-1)[0] += 1  # the rest is still checked
        base.base_model.get_parameter(partly(base)).add_(1)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors"):
        gradsel.load_delta(base, folder / "task.delta")


def partly(model):
    """A weight of the body that is trained in part."""
    return next(
        name
        for name, p in model.base_model.named_parameters()
        if name.endswith("weight") and p.ndim == 2 and "layer" in name
    )


def test_tasks_with_heads_of_their_own_sizes_share_a_bank(case, tmp_path):
    kind, folder, trained = case
    wide = attached(kind, folder / "body", labels=5, seed=2)
    gradsel.save_delta(wide, tmp_path / "wide.delta")
    expected = {"narrow": logits(trained, kind), "wide": logits(wide, kind)}
    torch.manual_seed(9)
    base = classes(kind)[1].from_pretrained(folder / "body", num_labels=3)
    expected[None] = logits(base, kind)
    bank = gradsel.TaskBank(base)
    bank.add("wide", tmp_path / "wide.delta")
    bank.add("narrow", folder / "task.delta")
    bank.save(tmp_path / "bank")
    for each in (bank, gradsel.TaskBank.load(base, tmp_path / "bank")):
        for task in ("wide", "narrow", "wide", None, "narrow", None):
            each.activate(task)
            assert torch.equal(logits(base, kind), expected[task]), task


@pytest.mark.parametrize("base", ["body", "body sharded"])
def test_a_trainer_checkpoint_becomes_a_delta_and_a_folder_again(case, base, tmp_path, capsys):
    kind, folder, trained = case
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "config.json").write_text((folder / "checkpoint-2" / "config.json").read_text())
    made, out = tmp_path / "task" / "made.delta", tmp_path / "out"
    assert any(name.endswith("_values") for name in load_file(folder / "checkpoint-2" / FILE))
    assert run("make", folder / base, folder / "checkpoint-2", made) == 0
    assert "classifier" in capsys.readouterr().out
    assert run("apply", made, folder / base, out) == 0
    printed = capsys.readouterr().out
    assert "classifier.weight is the task's, 3x16; BASE has none" in printed
    assert (out / "tokenizer.json").exists()
    assert (out / INDEX).exists() == (base == "body sharded")
    loaded = classes(kind)[1].from_pretrained(out)
    assert torch.equal(logits(loaded, kind), logits(trained, kind))
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "task/config.json").read_text())


def test_a_delta_of_the_model_gives_a_folder_too(case, tmp_path):
    """By the names of the model, which are not those of a ViT's checkpoint, nor of a body without a prefix."""
    kind, folder, trained = case
    assert (
        run("apply", folder / "task.delta", folder / "body", tmp_path / "out", "--model", folder / "checkpoint-2") == 0
    )
    loaded = classes(kind)[1].from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, kind), logits(trained, kind))


@pytest.mark.parametrize("kind", ["Mixtral", "Swin"])
def test_values_of_split_and_renamed_weights_are_ignored(kind, tmp_path):
    """The experts of a Mixtral are one weight with one set of values in the model, and many weights in checkpoints."""
    if kind == "Swin":
        settings = transformers.SwinConfig(
            image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2
        )
        model, inputs = transformers.SwinModel(settings), {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        settings = transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, vocab_size=20, num_local_experts=3, num_experts_per_tok=2
        )
        model, inputs = transformers.MixtralModel(settings), {"input_ids": torch.arange(8).view(2, 4)}
    model.save_pretrained(tmp_path / "base")
    selection = gradsel.select(
        model, [inputs], lambda model, batch: model(**batch)[0].square().sum(), gradsel.PerNeuron(1)
    )
    gradsel.attach(model, selection)
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(1)
    model.save_pretrained(tmp_path / "checkpoint-2")
    assert any(name.endswith("_values") for name in load_file(tmp_path / "checkpoint-2" / FILE))
    assert run("make", tmp_path / "base", tmp_path / "checkpoint-2", tmp_path / "d") == 0
    assert run("apply", tmp_path / "d", tmp_path / "base", tmp_path / "out") == 0
    found, expected = load_file(tmp_path / "out" / FILE), load_file(tmp_path / "checkpoint-2" / FILE)
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items())
    assert expected.keys() - found.keys() == {name for name in expected if name.endswith("_values")}


def test_values_that_their_weights_do_not_hold_are_refused(case, tmp_path, capsys):
    _, folder, _ = case
    tensors = load_file(folder / "checkpoint-2" / FILE)
    name = next(name for name in tensors if name.endswith("_values"))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / FILE)
    assert run("make", folder / "body", tmp_path / FILE, tmp_path / "d") == 1
    assert f"1 of {tensors[name].numel()} entries of {name} are not in" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


# --- Deltas that only have a head ---------------------------------------------------------------------------------


@pytest.fixture
def probe(case, tmp_path):
    """The delta of a head alone on a body, its logits, and the folder of the model that both make."""
    kind, folder, _ = case
    torch.manual_seed(3)
    model = classes(kind)[1].from_pretrained(folder / "body", num_labels=3)
    model.save_pretrained(tmp_path / "whole")
    names = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    masks = {
        name: Whole(tuple(p.shape)) if name in names else Frozen(tuple(p.shape)) for name, p in model.named_parameters()
    }
    gradsel.save_delta(model, tmp_path / "probe.delta", selection=gradsel.Selection(masks))
    assert set(gradsel.Delta.load(tmp_path / "probe.delta")) == {"classifier.weight", "classifier.bias"}
    return kind, folder / "body", tmp_path, logits(model, kind)


@pytest.mark.parametrize("place", ["beside", "--model"])
def test_a_head_alone_goes_to_its_body(probe, place, capsys):
    kind, body, folder, expected = probe
    options = ["--model", folder / "whole"]
    if place == "beside":
        (folder / "config.json").write_text((folder / "whole" / "config.json").read_text())
        options = []
    assert run("apply", folder / "probe.delta", body, folder / "out", *options) == 0
    assert "classifier.weight is the task's, 3x16; BASE has none" in capsys.readouterr().out
    assert torch.equal(logits(classes(kind)[1].from_pretrained(folder / "out"), kind), expected)


def test_a_head_alone_is_refused_where_nothing_shows_its_base(probe, capsys):
    kind, body, folder, _ = probe

    def refused(*options):
        assert run("apply", folder / "probe.delta", body, folder / "out", *options) == 1
        assert not (folder / "out").exists()
        return capsys.readouterr().err

    told = refused()  # the config of the body is that of a model without a head
    assert "all 2 tensors of the delta, first classifier.weight, are missing in" in told
    assert "the delta has classifier.weight [3, 16], the model none" in told
    assert "--model FOLDER" in told
    assert "--force" in told
    other = classes(kind)[1](config(kind, 3, num_hidden_layers=3))
    other.save_pretrained(folder / "other")
    assert "which is neither in the delta nor in the checkpoint" in refused("--model", folder / "other")
    plain = folder / "plain"
    plain.mkdir()
    (plain / FILE).write_bytes((body / FILE).read_bytes())
    assert run("apply", folder / "probe.delta", plain, folder / "out") == 1
    assert "put the config.json of the task's model beside the delta, or pass --model FOLDER" in capsys.readouterr().err
    assert run("apply", folder / "probe.delta", body, folder / "out", "--force") == 0
