"""Deltas on a model hub: pushed with a card in one commit, fetched by their id, and applied elsewhere."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
import transformers
import yaml

import gradsel
from gradsel.cli.main import main
from gradsel.delta.parts import same_bits
from gradsel.integrations.transformers import from_pretrained, save_pretrained
from tests.support import hub, tiny


@pytest.fixture
def served(monkeypatch, tmp_path):
    with hub.used_by_all(monkeypatch, tmp_path / "cache") as repos:
        yield repos


@pytest.fixture
def trained(tmp_path):
    """A model from a folder, attached and trained."""
    tiny.bert().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    gradsel.attach(model, gradsel.select(model, tiny.texts(), gradsel.contrastive(), gradsel.PerNeuron(1)))
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(0.1)
    gradsel.sync(model)
    return model


def test_a_pushed_delta_works_elsewhere(trained, tmp_path, served):
    delta = gradsel.Delta.of(trained, notes=dict(gradsel.select(tiny.bert(), None, None, criterion="random").notes))
    address = delta.push_to_hub("user/birds", base="google/tiny-bert", token="right")
    assert address.endswith(f"/user/birds/commit/{hub.COMMIT}")
    assert set(served["user/birds"]) == {"gradsel.delta", "README.md"}
    fetched = gradsel.Delta.from_pretrained("user/birds")
    assert fetched == delta
    assert fetched.notes == delta.notes
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    fetched.apply_(base)
    plain = gradsel.detach(trained).state_dict()
    assert all(same_bits(tensor, plain[name]) for name, tensor in base.state_dict().items())


def test_the_command_pushes_a_delta(trained, tmp_path, served, capsys):
    delta = gradsel.Delta.of(trained)
    delta.save(tmp_path / "birds.safetensors")
    save_pretrained(trained, tmp_path / "folder")
    for source in ("birds.safetensors", "folder"):
        command = ["push", str(tmp_path / source), f"user/{source}", "--base", "google/tiny-bert", "--token", "right"]
        assert main(command) == 0
        assert capsys.readouterr().out.strip().endswith(f"/user/{source}/commit/{hub.COMMIT}")
        assert gradsel.Delta.from_pretrained(f"user/{source}") == delta
        card = huggingface_hub.ModelCard(served[f"user/{source}"]["README.md"].decode())
        assert card.data.base_model == "google/tiny-bert"
        assert main(["delta", "info", f"user/{source}"]) == 0
        assert str(delta) in capsys.readouterr().out
    assert main(["delta", "info", str(tmp_path / "folder")]) == 0
    assert "gradsel.delta: " in capsys.readouterr().out


def test_what_the_command_cannot_push(tmp_path, served, capsys):
    (tmp_path / "note.txt").write_text("no delta")
    (tmp_path / "empty").mkdir()
    for source, options, message in (
        ("nowhere", [], "there is no file or folder"),
        ("note.txt", [], "is not a readable safetensors file"),
        ("empty", [], "holds no finished result of gradsel"),
        ("empty", ["--base", "google/tiny-bert"], "--base is for a delta"),
    ):
        assert main(["push", str(tmp_path / source), "user/birds", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("gradsel push: ")
        assert message in error
        assert error.count("\n") == 1
    assert not served


def test_the_card_says_what_it_is(trained, tmp_path, served):
    delta = gradsel.Delta.of(trained, notes={"policy": "PerNeuron(1)", "criterion": "gradient"})
    trained.config.name_or_path = "google/tiny-bert"
    delta.push_to_hub("user/birds", base=trained, token="right")
    card = huggingface_hub.ModelCard(served["user/birds"]["README.md"].decode())
    assert card.data.base_model == "google/tiny-bert"
    assert card.data.library_name == "gradsel"
    total = sum(tensor.numel() for tensor in gradsel.detach(trained).parameters())
    share = 100 * delta.trainable_count() / total
    text = card.content
    assert f"| entries set | {delta.trainable_count():,} of {total:,} ({share:.3g} %) |" in text
    assert "| policy | PerNeuron(1) |" in text
    assert "| criterion | gradient |" in text
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("'google/tiny-bert'", repr(str(tmp_path / "base")))
    space: dict = {}
    exec(compile(code, "card", "exec"), space)
    plain = trained.state_dict()
    assert all(same_bits(tensor, plain[name]) for name, tensor in space["model"].state_dict().items())


def test_a_card_has_no_paths_of_this_machine(trained, tmp_path, served):
    trained.config.name_or_path = str(tmp_path / "base")
    gradsel.Delta.of(trained).push_to_hub("user/birds", base=trained, token="right")
    card = served["user/birds"]["README.md"].decode()
    assert str(tmp_path) not in card
    assert "| base | `base` |" in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_folders_and_files_are_sources_too(trained, tmp_path, served):
    delta = save_pretrained(trained, tmp_path / "out")
    for source in (tmp_path / "out", tmp_path / "out" / "gradsel.delta", str(tmp_path / "out")):
        assert gradsel.Delta.from_pretrained(source) == delta
    delta.save(tmp_path / "delta.safetensors")
    assert gradsel.Delta.from_pretrained(tmp_path) == delta  # as in a result of gradsel finetune


def test_without_a_network_the_cache_will_do(trained, served, monkeypatch):
    delta = gradsel.Delta.of(trained)
    delta.push_to_hub("user/birds", token="right")
    gradsel.Delta.from_pretrained("user/birds")
    served["user/result"] = {"delta.safetensors": served["user/birds"]["gradsel.delta"]}  # of gradsel finetune
    assert gradsel.Delta.from_pretrained("user/result") == delta
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("user/birds", "user/result"):
        assert gradsel.Delta.from_pretrained(name) == delta
    with pytest.raises(ValueError, match=r"user/other has no delta, or it cannot be reached"):
        gradsel.Delta.from_pretrained("user/other")


def test_a_whole_folder_on_a_hub_is_attached_again(trained, tmp_path, served):
    save_pretrained(trained, tmp_path / "out")
    served["user/whole"] = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    delta = gradsel.Delta.from_pretrained("user/whole", token="right")
    assert delta == gradsel.Delta.of(trained)
    again = from_pretrained(transformers.BertForSequenceClassification, tmp_path / "out", token="right")
    assert gradsel.Delta.of(again) == delta


def test_what_cannot_be_pushed_or_fetched(trained, tmp_path, served):
    delta = gradsel.Delta.of(trained)
    with pytest.raises(ValueError, match=r"^user/birds cannot be pushed \(") as raised:
        delta.push_to_hub("user/birds", token="wrong")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"^no//id cannot be pushed \("):
        delta.push_to_hub("no//id", token="right")
    with pytest.raises(ValueError, match=r"there is no file or folder user/nothing, and no delta .*RepositoryNotFound"):
        gradsel.Delta.from_pretrained("user/nothing")
    served["user/empty"] = {"README.md": b""}
    with pytest.raises(ValueError, match=r"repository user/empty has no delta, .*: neither gradsel\.delta nor"):
        gradsel.Delta.from_pretrained("user/empty")
    with pytest.raises(ValueError, match="has no delta: neither"):
        gradsel.Delta.from_pretrained(tmp_path)
    served["user/damaged"] = {"gradsel.delta": b"no delta"}
    with pytest.raises(ValueError, match=r"not a delta|damaged|safetensors"):
        gradsel.Delta.from_pretrained("user/damaged")
