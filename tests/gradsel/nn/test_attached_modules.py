"""Attached modules copied, pickled, loaded, cast and detached, and selections that attach() refuses."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsel
from gradsel.masks import Whole
from tests.support.hugging_face import hugging_face
from tests.support.selections import KINDS, check_consistent, data, random_selection, toy
from tests.support.toy import Toy, cross_entropy

# --- What people do with a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_attached_models_of_their_own(way):
    model, selection = toy()
    gradsel.attach(model, selection)
    if way == "deepcopy":
        made = copy.deepcopy(model)
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    untouched = copy.deepcopy(model.state_dict())
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(made), lr=0.1)
    cross_entropy(made, data()[0]).backward()
    optimizer.step()
    check_consistent(made)
    assert not torch.equal(made.blocks[0].fc1.weight_values, model.blocks[0].fc1.weight_values)
    model.eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, untouched[name])
    gradsel.detach(made, restore=True)
    assert type(made.blocks[0].fc1) is nn.Linear
    assert torch.equal(made.blocks[0].fc1.weight, model.blocks[0].fc1.weight)


def test_a_loaded_model_trains_in_a_process_that_never_attached(tmp_path):
    model, selection = toy()
    gradsel.attach(model, selection)
    torch.save(model, tmp_path / "model.pt")
    script = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
optimizer.step()
layer = model.blocks[0].fc1
rows = layer.weight.detach()
assert all((rows[i] == value).any() for i, pair in enumerate(layer.weight_values) for value in pair)
"""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_recurrent_layers_are_copied_and_cast():
    model = nn.LSTM(4, 4)
    gradsel.attach(model, random_selection(model))
    made = pickle.loads(pickle.dumps(copy.deepcopy(model))).double()
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(made), lr=0.1)
    made(torch.randn(3, 4, dtype=torch.float64))[0].sum().backward()
    optimizer.step()
    check_consistent(made)
    assert not torch.equal(made.weight_ih_l0_values.float(), model.weight_ih_l0_values)


def test_an_optimizer_of_before_does_not_touch_a_detached_model():
    model, selection = toy()
    gradsel.attach(model, selection)
    old = torch.optim.SGD(gradsel.trainable_parameters(model), lr=0.1)
    values = [p for p in gradsel.trainable_parameters(model) if p.ndim == 2]
    cross_entropy(model, data()[0]).backward()
    gradsel.detach(model)
    before = model.blocks[0].fc1.weight.clone()
    old.step()
    assert torch.equal(model.blocks[0].fc1.weight, before)
    gradsel.attach(model, selection)
    old.step()
    assert torch.equal(model.blocks[0].fc1.weight, before)
    assert values


def test_a_part_of_a_model_with_tied_weights_goes_on_alone():
    model, _ = hugging_face("tied Llama")
    gradsel.attach(model, random_selection(model, rank=["model.embed_tokens.weight"]))
    body = model.model
    del model
    gc.collect()
    optimizer = torch.optim.SGD(gradsel.trainable_parameters(body), lr=0.1)
    body(input_ids=torch.randint(0, 50, (2, 6))).last_hidden_state.square().sum().backward()
    optimizer.step()
    check_consistent(body)


def test_convolutions_that_were_changed_after_they_were_made():
    layer = nn.Conv2d(3, 4, 3)
    layer.padding, layer.dilation, layer.stride = (2, 2), (2, 2), (2, 2)
    x = torch.randn(1, 3, 9, 9)
    expected = layer(x)
    gradsel.attach(layer, random_selection(layer))
    assert torch.equal(layer(x), expected)


class Casting(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


def test_layers_with_a_forward_of_their_own_are_harvested():
    model = nn.Sequential(Casting(3, 4, 3), nn.Linear(6, 6))
    model[1].forward = lambda x, own=model[1]: F.linear(x, own.weight, own.bias)
    report = gradsel.attach(model, random_selection(model))
    assert report["0.weight"].route == report["1.weight"].route == "harvest"
    model(torch.randn(2, 3, 8)).sum().backward()
    assert model[0].weight_values.grad is not None
    assert model[1].weight_values.grad is not None


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_with_sparse_gradients_or_counts(sparse):
    model = nn.Embedding(6, 4, sparse=sparse, scale_grad_by_freq=not sparse)
    dense = nn.Embedding(6, 4, sparse=sparse, scale_grad_by_freq=not sparse)
    dense.load_state_dict(model.state_dict())
    selection = random_selection(model, rank=["weight"])
    gradsel.attach(model, selection)
    tokens = torch.tensor([1, 1, 5])
    for trained in (model, dense):
        trained(tokens).square().sum().backward()
    grad = dense.weight.grad.to_dense() if sparse else dense.weight.grad
    torch.testing.assert_close(model.weight_values.grad, selection["weight"].gather(grad))
    limited = nn.Embedding(6, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        gradsel.attach(limited, random_selection(limited, rank=["weight"]))


def test_casts_keep_values_in_float32():
    model, selection = toy()
    gradsel.attach(model, selection)
    values = model.blocks[0].fc1.weight_values
    before = values.detach().clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].fc1.weight_values is values
    assert torch.equal(values, before)  # in float32, never rounded on the way
    check_consistent(model)
    cross_entropy(model, data(torch.bfloat16)[0]).backward()
    model.double()
    assert values.dtype is values.grad.dtype is torch.float64
    cross_entropy(model, data(torch.float64)[0]).backward()
    model.float()
    assert values.dtype is torch.float32
    assert gradsel.MaskedAdam(gradsel.trainable_parameters(model)).step() is None
    check_consistent(model)


def test_state_dict_in_the_middle_of_training():
    model, selection = toy()
    base_keys = set(model.state_dict())
    gradsel.attach(model, selection)
    assert base_keys < set(model.state_dict())
    assert {key for key in set(model.state_dict()) - base_keys if not key.endswith("weight_values")} == set()

    def train(model, optimizer, part):
        for i, batch in enumerate(data(count=6)[part]):
            torch.manual_seed(i)
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    train(model, optimizer, slice(0, 3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, slice(3, 6))

    other, _ = toy()
    gradsel.attach(other, selection)
    resumed = gradsel.MaskedAdam(gradsel.trainable_parameters(other), lr=1e-2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, slice(3, 6))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_loading_a_plain_checkpoint_refreshes_the_values():
    model, selection = toy()
    gradsel.attach(model, selection)
    torch.manual_seed(9)
    base = Toy().state_dict()
    model.load_state_dict(base)
    check_consistent(model)
    assert torch.equal(model.blocks[0].fc1._parameters["weight"], base["blocks.0.fc1.weight"])
    values = {name: torch.zeros_like(v) for name, v in model.state_dict().items() if name.endswith("_values")}
    model.load_state_dict(values, strict=False)  # only the values: the fine-tuned difference
    check_consistent(model)
    assert int((model.blocks[0].fc1._parameters["weight"] == 0).sum()) >= 24
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in base.items() if name != "blocks.0.fc1.weight"})


def test_assigned_parameters_are_linked():
    model, selection = toy()
    gradsel.attach(model, selection)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
    before = model.blocks[0].fc1.weight_values.detach().clone()
    cross_entropy(model, data()[0]).backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].fc1.weight_values, before)
    check_consistent(model)


def test_shared_memory_includes_the_values():
    model, selection = toy()
    gradsel.attach(model, selection)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_sync_writes_values_changed_by_hand():
    model, selection = toy()
    gradsel.attach(model, selection)
    with torch.no_grad():
        model.blocks[0].fc1.weight_values.fill_(7)
    gradsel.sync(model)
    check_consistent(model)
    assert (model.blocks[0].fc1.weight == 7).sum() == 48


@pytest.mark.parametrize("kind", KINDS)
def test_detach_gives_everything_back(kind):
    model, selection = toy(kind)
    model.blocks[0].norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    original = copy.deepcopy(model.state_dict())
    printed = repr(model)
    for restore in (False, True):
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
        model.eval()
        for batch in data():
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        output = model(data()[0][0])
        assert gradsel.detach(model, restore=restore) is model
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: id(p) for name, p in model.named_parameters()} == identities
        assert repr(model) == printed
        assert not any("gradsel" in key or "_selected" in key for m in model.modules() for key in vars(m))
        if not restore:
            assert torch.equal(model(data()[0][0]), output)
            model.load_state_dict(original)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    with pytest.raises(ValueError, match="not attached"):
        gradsel.detach(model)


def test_inference_runs_the_plain_operators():
    """An attached model without gradients runs the same operators as the plain model, and so does a detached one."""
    model, selection = toy()
    model.eval()
    x = data()[0][0]

    def operators():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            model(x)
        return sorted((event.key, event.count) for event in profile.key_averages() if "profiler" not in event.key)

    plain = operators()
    gradsel.attach(model, selection)
    assert operators() == plain
    gradsel.detach(model)
    assert operators() == plain


# --- Refusals ----------------------------------------------------------------------------------------------------


def test_a_selection_of_another_model_changes_nothing():
    model, selection = toy()
    before = (repr(model), [p.requires_grad for p in model.parameters()])
    larger = random_selection(Toy(dim=24))
    fewer = gradsel.Selection({name: mask for name, mask in selection.items() if name != "head.bias"})
    more = gradsel.Selection({**selection, "extra.weight": Whole((3,))})
    whole_number = gradsel.Selection({**selection, "patch_embed.weight": Whole((3, 3))})
    for bad, error, message in [
        (larger, ValueError, "shape .*select on this model"),
        (fewer, KeyError, r"'head\.bias'"),
        (more, ValueError, r"1 parameter.*'extra\.weight'"),
        (whole_number, ValueError, r"patch_embed\.weight .*\[3, 3\]"),
    ]:
        with pytest.raises(error, match=message):
            gradsel.attach(model, bad)
        assert before == (repr(model), [p.requires_grad for p in model.parameters()])
    model.blocks[1].fc1.weight_values = torch.zeros(1)
    with pytest.raises(ValueError, match="weight_values"):
        gradsel.attach(model, selection)
    assert before[1] == [p.requires_grad for p in model.parameters()]


def test_sync_and_detach_of_a_wrapper():
    model, selection = toy()
    gradsel.attach(model, selection)
    wrapped = nn.Sequential(model)
    gradsel.sync(wrapped)
    with pytest.raises(ValueError, match="module around"):
        gradsel.detach(model.blocks[0])
    assert gradsel.detach(wrapped) is wrapped
    assert type(model.blocks[0].fc1) is nn.Linear
