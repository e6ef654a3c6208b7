"""Folders of trained models: plain for every reader, and attached again where training goes on."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import gradsel
from gradsel.delta.parts import same_bits
from gradsel.integrations.transformers import from_pretrained, save_pretrained
from tests.support import pretrained, tiny

peft = pytest.importorskip("peft")

INDEX = "model.safetensors.index.json"


def next_token(model, batch):
    return model(**batch).loss


def llama(tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    tokens = torch.randint(0, 50, (4, 8))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, {"input_ids": tokens, "labels": tokens}


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4) % 3,
    }  # fmt: skip


def mixtral():
    """Its experts are one tensor in the model, and many in checkpoints."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    tokens = torch.arange(8).view(2, 4)
    return transformers.MixtralForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def minilm():
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pretrained.minilm(), num_labels=3)
    return model, {"input_ids": torch.randint(1000, 2000, (3, 6)), "labels": torch.arange(3)}


MODELS = {
    "tied Llama": llama,
    "Llama": lambda: llama(tied=False),
    "tied Llama in bfloat16": lambda: llama(dtype=torch.bfloat16),
    "BERT": lambda: (tiny.bert(), tiny.texts()[0]),
    "ViT": vit,
    "Mixtral": mixtral,
    "MiniLM": minilm,
}
each_model = pytest.mark.parametrize("name", MODELS)


def attached(name):
    """An attached, trained model, its batch, and what it was before."""
    model, batch = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    gradsel.attach(model, gradsel.select(model, [batch], next_token, gradsel.PerNeuron(2)))
    train(model, batch)
    return model, batch, before


def train(model, batch, steps=2):
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    model.train()
    for _ in range(steps):
        torch.manual_seed(0)  # of dropout
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


class Silence(logging.Handler):
    def emit(self, record):
        assert record.levelno < logging.WARNING, record.getMessage()


@contextmanager
def silence():
    """transformers warns of nothing."""
    handler, logger = Silence(), transformers.utils.logging.get_logger()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)


@each_model
@pytest.mark.parametrize("size", ["50GB", "4KB"])
def test_the_folder_is_that_of_the_plain_model(name, size, tmp_path):
    if name == "MiniLM":
        size = {"4KB": "20MB"}.get(size, size)
    model, batch, _ = attached(name)
    expected = logits(model, batch)
    save_pretrained(model, tmp_path / "ours", max_shard_size=size)
    plain = gradsel.detach(model)
    plain.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, theirs = ({path.name for path in (tmp_path / each).iterdir()} for each in ("ours", "theirs"))
    assert ours - theirs == {"gradsel.delta"}
    assert theirs <= ours
    assert (INDEX in ours) == (size != "50GB")
    # As vLLM reads it: every file that ends so, by the names of the plain model, each once.
    for file in sorted(theirs):
        if file.endswith(".safetensors"):
            mine, other = (load_file(tmp_path / each / file) for each in ("ours", "theirs"))
            assert mine.keys() == other.keys()
            assert all(same_bits(tensor, other[key]) for key, tensor in mine.items())
        elif file.endswith(".json"):
            texts = [(tmp_path / each / file).read_text() for each in ("ours", "theirs")]
            assert json.loads(texts[0]) == json.loads(texts[1])
    with silence():
        read, found = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(read, batch), expected)
    assert type(model).__name__ in json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]


@each_model
def test_the_own_method_of_an_attached_model_writes_the_plain_model(name, tmp_path):
    model, batch, _ = attached(name)
    with torch.no_grad():  # nothing has used the weights since
        for parameter in gradsel.trainable_parameters(model):
            parameter.mul_(1.01)
    again = copy.deepcopy(model)
    for each, folder in ((model, "ours"), (again, "copy"), (torch.compile(model, backend="eager"), "compiled")):
        each.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "checkpoint-2")
    plain = gradsel.detach(model)
    plain.save_pretrained(tmp_path / "theirs")
    written = {path.name for path in (tmp_path / "theirs").iterdir()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    for folder in ("ours", "copy", "compiled"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == theirs.keys()
        assert all(same_bits(tensor, theirs[key]) for key, tensor in found.items())
    values = load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys() - theirs.keys()
    assert values
    assert all(key.endswith("_values") for key in values)
    assert "save_pretrained" not in vars(plain)
    delta = gradsel.Delta.of(again)
    for folder in ("ours", "copy", "compiled"):
        assert {path.name for path in (tmp_path / folder).iterdir()} - {"gradsel.delta"} == written
        assert gradsel.Delta.from_pretrained(tmp_path / folder) == delta
    assert not (tmp_path / "checkpoint-2" / "gradsel.delta").exists()
    with silence():
        read, found = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
        goes_on = from_pretrained(type(model), tmp_path / "ours")
    assert not any(found.values())
    assert torch.equal(logits(read, batch), logits(plain, batch))
    assert all(same_bits(tensor, goes_on.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_what_cannot_be_saved_beside_is_told_and_only_one_process_saves(tmp_path, monkeypatch):
    model, _, _ = attached("Llama")
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / "gradsel.delta").exists()

    def refuse(*_, **__):
        raise ValueError("the weights are of another model")

    monkeypatch.setattr(gradsel.Delta, "of", refuse)
    with pytest.warns(UserWarning, match="no gradsel.delta by which training would go on: the weights are of another"):
        model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").exists()


@each_model
def test_an_attached_model_goes_on_from_the_folder(name, tmp_path):
    model, batch, before = attached(name)
    with silence():
        save_pretrained(model, tmp_path, notes={"task": "birds"})
        again = from_pretrained(type(model), tmp_path)
    assert gradsel.attached.is_attached(again)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert gradsel.Delta.of(again) == gradsel.Delta.of(model)
    train(model, batch)
    train(again, batch)
    state = again.state_dict()
    assert all(same_bits(tensor, state[key]) for key, tensor in model.state_dict().items())
    base = gradsel.detach(again, restore=True).state_dict()
    assert all(same_bits(tensor, base[key]) for key, tensor in before.items())


def test_classes_that_find_the_model_work_too(tmp_path):
    model, *_ = attached("tied Llama")
    save_pretrained(model, tmp_path)
    assert type(from_pretrained(transformers.AutoModelForCausalLM, tmp_path)) is type(model)


def test_a_new_save_leaves_no_files_of_the_old_one(tmp_path):
    model, batch, _ = attached("Llama")
    save_pretrained(model, tmp_path, max_shard_size="4KB")
    (tmp_path / "notes.txt").write_text("mine")
    many = {path.name for path in tmp_path.glob("model-*")}
    assert len(many) > 3
    save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}
    save_pretrained(model, tmp_path, max_shard_size="4KB")
    assert {path.name for path in tmp_path.glob("model*")} == many | {INDEX}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), logits(model, batch))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    model, batch, _ = attached("Llama")
    save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, batch)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(gradsel.Delta, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(model, tmp_path, max_shard_size="4KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_is_not_attached_needs_its_base_or_selection(tmp_path):
    model, _, before = attached("BERT")
    gradsel.detach(model)
    with pytest.raises(ValueError, match=r"not attached: pass the selection .* or its base"):
        save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    delta = save_pretrained(model, tmp_path / "a", base=before)
    assert gradsel.Delta.of(from_pretrained(type(model), tmp_path / "a")) == delta


def test_what_cannot_be_saved_or_read(tmp_path):
    with pytest.raises(TypeError, match=r"Linear is not a model of transformers; gradsel\.export"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    model, *_ = attached("BERT")
    save_pretrained(model, tmp_path / "a")
    torch.manual_seed(5)
    other = transformers.BertForSequenceClassification(model.config)
    other.save_pretrained(tmp_path / "a")  # over it
    with pytest.raises(ValueError, match="do not hold the values of the delta, first"):
        from_pretrained(type(model), tmp_path / "a")
    save_pretrained(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"float32.*bfloat16|bfloat16.*float32"):
        from_pretrained(type(model), tmp_path / "b", dtype=torch.bfloat16)
    gradsel.save_delta(model, tmp_path / "b" / "gradsel.delta")
    with pytest.raises(ValueError, match=r"original entries of \d+ tensors, first .*originals=True"):
        from_pretrained(type(model), tmp_path / "b")
    (tmp_path / "b" / "gradsel.delta").unlink()
    with pytest.raises(ValueError, match=r"has no delta: neither gradsel\.delta nor"):
        from_pretrained(type(model), tmp_path / "b")
    adapted = peft.get_peft_model(tiny.bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    gradsel.attach(adapted, gradsel.select(adapted, tiny.texts(), next_token))
    with pytest.raises(ValueError, match=r"adapters of PEFT.*merge_and_unload"):
        save_pretrained(adapted, tmp_path / "c")


@each_model
def test_exports_are_read_by_transformers(name, tmp_path):
    model, batch, _ = attached(name)
    expected = logits(model, batch)
    gradsel.export(model, tmp_path / "out", max_shard_size="20MB" if name == "MiniLM" else "8KB")
    assert (tmp_path / "out" / INDEX).exists()
    with silence():
        read, found = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(read, batch), expected)


def test_exports_of_other_models_are_sharded_too(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40, bias=False))
    model[2].weight = model[0].weight  # tied
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random"))
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(1)
    gradsel.export(torch.compile(model, backend="eager"), tmp_path / "out", max_shard_size=7000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 2
    tensors = {}
    for file in set(index.values()):
        tensors |= load_file(tmp_path / "out" / file)
    assert tensors.keys() == index.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
    plain = gradsel.detach(model).state_dict()
    assert all(same_bits(tensor, plain[key]) for key, tensor in tensors.items())
    (tmp_path / "here").mkdir()
    gradsel.export(model, tmp_path / "here")  # a folder that exists
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_size is 'much'"):
        gradsel.export(model, tmp_path / "never", max_shard_size="much")
    assert not (tmp_path / "never").exists()
