"""Updates of a server's weights: what is in them, and that only the right one is applied."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import gradsel
from gradsel.delta.parts import same_bits
from gradsel.integrations.patches import Patches
from gradsel.integrations.receiving import Receiver, UpdateRefused, write_patches
from tests.support import tiny
from tests.support.checkpoints import llama, saved
from tests.support.deltas import plain

IDS = torch.arange(12).view(2, 6)


def moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def attached(model, k=2, **rules):
    model, policy = copy.deepcopy(model), gradsel.PerNeuron(k)
    gradsel.attach(model, gradsel.select(model, None, None, policy, "random", progress=False, **rules))
    return model


def trained_steps(model, steps, lr=1e-2):
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        yield


def receiver(tensors):
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, Receiver(lambda patches: write_patches(tensors, patches))


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


@pytest.mark.parametrize("make", [llama, moe, lambda: llama(torch.bfloat16)], ids=["llama", "experts", "bfloat16"])
def test_the_server_has_the_bits_that_save_pretrained_writes(make, tmp_path):
    base = make()
    server, receive = receiver(saved(base, tmp_path / "base"))
    model = attached(base)
    update = None
    for step, _ in enumerate(trained_steps(model, 3)):
        update = gradsel.patches(model, update)
        assert update.sequence == step
        receive.receive(update.to_bytes())
        assert_bits(server, saved(plain(model), tmp_path / str(step)))


def test_names_and_layout_are_those_of_checkpoints(tmp_path):
    base = moe()
    model = attached(base)
    names = {patch.name for patch in gradsel.patches(model)}
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert names <= saved(base, tmp_path).keys()


def test_only_what_changed_is_sent():
    model = attached(llama(torch.bfloat16))
    first = gradsel.patches(model)
    assert sum(patch.values.numel() for patch in first) == sum(p.numel() for p in gradsel.trainable_parameters(model))
    assert all(patch.indices is None for patch in first.whole)
    assert {patch.name.rpartition(".")[2] for patch in first.whole} == {"bias"}
    nothing = gradsel.patches(model, first)
    assert not nothing
    assert nothing.nbytes == 0
    _, receive = receiver({patch.name: torch.empty(patch.shape, dtype=patch.dtype) for patch in first})
    receive.receive(first)
    receive.receive(nothing.to_bytes())  # it may be sent, or not
    assert receive.sequence == 0
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight_values[0, 1] += 1
        layer.weight_values[1, 0] *= 1 + 2**-12  # lost when rounded to bfloat16
        model.model.layers[1].self_attn.q_proj.bias[3] = -0.0  # it was 0: another bit pattern
    update = gradsel.patches(model, nothing)
    receive.receive(update.to_bytes())
    (sparse,), (whole,) = update.sparse, update.whole
    assert sparse.name == "model.layers.0.mlp.up_proj.weight"
    assert sparse.values.tolist() == [layer.weight.detach()[0, int(sparse.indices) % 32].item()]
    assert sparse.dtype is sparse.values.dtype is torch.bfloat16
    assert sparse.indices.dtype is torch.int32
    assert whole.name == "model.layers.1.self_attn.q_proj.bias"
    everything = gradsel.patches(model, update, full=True)
    assert everything.is_full
    assert everything.sequence == 2
    assert everything.nbytes == first.nbytes


def test_the_dtype_of_the_server_decides_what_changed():
    model = attached(llama())
    exact, first = gradsel.patches(model), gradsel.patches(model, dtype=torch.bfloat16)
    assert {patch.dtype for patch in first} == {torch.bfloat16}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight_values.mul_(1 + 2**-20)
    assert gradsel.patches(model, exact)
    assert not gradsel.patches(model, first, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"was served in torch\.bfloat16 and would be served in torch\.float32 now"):
        gradsel.patches(model, first)


def test_buffers_are_sent_when_they_change():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    base = copy.deepcopy(model).state_dict()
    model = attached(model)
    server, receive = receiver(base)
    first = gradsel.patches(model)
    receive.receive(first)
    model(torch.randn(5, 4))
    update = gradsel.patches(model, first)
    assert {patch.name for patch in update} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    receive.receive(update.to_bytes())
    assert_bits(server, plain(model).state_dict())


def test_a_delta_is_an_update_too(tmp_path):
    base = tiny.bert()
    model = attached(base)
    for _ in range(1):
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
        model(**tiny.texts()[0]).loss.backward()
        optimizer.step()
    delta = gradsel.Delta.of(model)
    server, receive = receiver(base.state_dict())
    receive.receive(gradsel.patches(delta))
    assert_bits(server, plain(model).state_dict())


def updates_of(model, count):
    found = [gradsel.patches(model)]
    for _ in trained_steps(model, count - 1):
        found.append(gradsel.patches(model, found[-1]))
    return [update.to_bytes() for update in found], found[-1]


def test_missed_repeated_and_reordered_updates_are_refused_and_healed():
    base = llama()
    model = attached(base)
    sent, last = updates_of(model, 4)
    full = gradsel.patches(model, last, full=True).to_bytes()
    cases = {
        "missed": ([0, 1, 3], r"update 3 does not follow update 1 .*: updates between the two are missing"),
        "repeated": ([0, 1, 1], "update 1 came after update 1"),
        "reordered": ([0, 2], "update 2 does not follow update 0"),
        "late": ([0, 1, 2, 1], "update 1 came after update 2"),
        "first": ([2], "update 2 does not follow the base"),
    }
    for case, (order, message) in cases.items():
        server, receive = receiver(base.state_dict())
        for number in order[:-1]:
            receive.receive(sent[number])
        before = {name: tensor.clone() for name, tensor in server.items()}
        with pytest.raises(UpdateRefused, match=message):
            receive.receive(sent[order[-1]])
        assert_bits(server, before)
        receive.receive(full)
        assert_bits(server, plain(model).state_dict())
        with pytest.raises(UpdateRefused, match="came after"):
            receive.receive(sent[3])
        assert receive.sequence == 4, case


def test_another_run_begins_anew():
    base = llama()
    _, receive = receiver(base.state_dict())
    first, second = (attached(base) for _ in range(2))
    for data in updates_of(first, 3)[0]:
        receive.receive(data)
    sent, _ = updates_of(second, 2)
    with pytest.raises(UpdateRefused, match="does not follow update 2 of this server"):
        receive.receive(sent[1])
    for data in sent:
        receive.receive(data)
    assert receive.sequence == 1


def test_a_write_that_fails_is_followed_by_a_full_update():
    base = llama()
    model = attached(base)
    sent, last = updates_of(model, 3)
    server, receive = receiver(base.state_dict())
    receive.receive(sent[0])
    kept = server.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"up_proj\.weight is missing here, torch\.float32 \[48, 32\] in the update"):
        receive.receive(sent[1])
    server["model.layers.0.mlp.up_proj.weight"] = kept
    for data in sent[1:]:
        with pytest.raises(UpdateRefused):
            receive.receive(data)
    receive.receive(gradsel.patches(model, last, full=True))
    assert_bits({name: server[name] for name in base.state_dict()}, plain(model).state_dict())


def test_damaged_bytes_are_refused():
    sent, _ = updates_of(attached(llama()), 1)
    whole = sent[0]
    for damaged in (
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        whole.replace(b"up_proj", b"xp_proj", 1),
        whole.replace(b"float32", b"float33", 1),
        whole.replace(b"gradsel.patches", b"gradsel.pitches", 1),
    ):
        _, receive = receiver({})
        with pytest.raises(UpdateRefused, match=r"no update of weights|is damaged"):
            receive.receive(damaged)
        assert receive.sequence == -1
    assert Patches.from_bytes(whole).to_bytes() == whole


def test_other_entries_are_no_update_of_the_same_weights():
    base = llama()
    first = gradsel.patches(attached(base))
    with pytest.raises(ValueError, match=r"other entries of .* are trained than in the last update"):
        gradsel.patches(attached(base, 3), first)
    with pytest.raises(ValueError, match="other tensors are trained than in the last update, first"):
        gradsel.patches(attached(base, kinds={"bias": "freeze"}), first)
    with pytest.raises(ValueError, match="the model is not attached"):
        gradsel.patches(base)
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype to serve in"):
        gradsel.patches(attached(base), dtype=torch.int8)
    model = attached(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight_values[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up_proj\.weight has values that are NaN"):
        gradsel.patches(model)


def test_the_bytes_are_as_documented():
    """A server in any language can read an update: one JSON header, and two vectors for each tensor."""
    data = updates_of(attached(llama()), 1)[0][0]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["update"])
    assert header.keys() == {"format", "version", "run", "sequence", "before", "after", "patches"}
    assert header["patches"][0] == ["model.layers.0.self_attn.q_proj.weight", [32, 32], "float32"]
