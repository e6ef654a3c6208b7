"""PEFT's sparse adapters with our forward and backward: the same results, files and life cycle."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gradsel
from gradsel.delta.parts import same_bits

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("gradsel.peft").accelerate


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(x))))


TARGETS = {"target_modules": ["up", "down"], "modules_to_save": ["head"]}


def shira(**changes):
    return peft.ShiraConfig(**{"r": 2, "random_seed": 0} | TARGETS | changes)


def supertuning(**changes):
    return peft.SupertuningConfig(**{"sparsity": 0.9} | TARGETS | changes)


CONFIGS = {"shira": shira, "supertuning": supertuning, "supra": lambda **more: supertuning(r=2, **more)}
each_kind = pytest.mark.parametrize("kind", CONFIGS)


def pair(kind, dtype=torch.float32, **changes):
    """The same adapted model twice, once accelerated."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Net().to(dtype), CONFIGS[kind](init_weights=False, **changes))
    ours = copy.deepcopy(theirs)
    return theirs, accelerate(ours)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 24, generator=generator).to(dtype)


def stepped(model, x, optimizer=torch.optim.Adam, steps=1):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def saved_bytes(model, x):
    """Bytes of what forward keeps for backward, without parameters and the input."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    found = {}

    def pack(tensor):
        if tensor.is_sparse:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(found.values())


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_peft(kind, dtype):
    theirs, ours = pair(kind, dtype)
    before = base_weights(ours)
    x, y = data(dtype).requires_grad_(), data(dtype).requires_grad_()
    out, expected = ours(x), theirs(y)
    with theirs.disable_adapter():
        assert not torch.allclose(expected, theirs(y))
    torch.testing.assert_close(out, expected)
    (out.float().square().sum()).backward()
    (expected.float().square().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert any("shira" in name or "supertuning" in name for name in grads)
    tolerance = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}  # theirs is rounded before it is summed
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], msg=name, **tolerance)
    for name, weight in base_weights(ours).items():
        assert same_bits(weight, before[name]), name


@each_kind
def test_no_dense_gradient_and_no_composed_weight(kind):
    """The layers' weights are large beside their input, and backward keeps none of them a second time."""
    theirs, ours = pair(kind)
    x = data().requires_grad_()
    composed = sum(weight.nbytes for name, weight in base_weights(ours).items() if weight.ndim == 2)
    assert saved_bytes(ours, x) < saved_bytes(theirs, x) - 0.5 * composed


@each_kind
def test_training_switching_and_merging_go_on_as_in_peft(kind, tmp_path):
    theirs, ours = pair(kind)
    x = data()
    for model in (theirs, ours):
        stepped(model, x, steps=3)
        model.add_adapter("other", CONFIGS[kind](init_weights=False, modules_to_save=None))
        model.set_adapter("other")
        torch.manual_seed(2)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".other" in name:
                    p.copy_(torch.randn_like(p) * 0.1)
        stepped(model, x, steps=2)
    outputs = []
    for model in (theirs, ours):
        found = [model(x)]
        model.set_adapter("default")
        found.append(model(x))
        with model.disable_adapter():
            found.append(model(x))
        model.merge_adapter()
        found.append(model(x))
        model.unmerge_adapter()
        found.append(model(x))
        model.base_model.set_adapter(["default", "other"])
        found.append(model(x))
        outputs.append(found)
    for number, (expected, found) in enumerate(zip(*outputs, strict=True)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=str(number))
    theirs.set_adapter("default")
    ours.set_adapter("default")
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    expected = load_file(tmp_path / "theirs/adapter_model.safetensors")
    found = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    torch.manual_seed(0)
    loaded = accelerate(peft.PeftModel.from_pretrained(Net(), tmp_path / "ours"))
    torch.testing.assert_close(loaded(x), ours(x))
    merged = ours.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), theirs.merge_and_unload()(x), rtol=1e-4, atol=1e-5)


@each_kind
def test_masked_adam_takes_the_parameters(kind):
    theirs, ours = pair(kind)
    x = data()
    stepped(theirs, x, torch.optim.Adam, 3)
    stepped(ours, x, gradsel.MaskedAdam, 3)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-4, atol=1e-5, msg=name)


@each_kind
def test_autocast_checkpointing_and_copies(kind):
    theirs, ours = pair(kind)
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)
    expected = stepped(theirs, x)
    twin = copy.deepcopy(ours)
    found = {}
    out = torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False)
    out.square().mean().backward()
    found = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_error_leaves_the_base_as_it_was():
    _, ours = pair("shira")
    before = base_weights(ours)
    with pytest.raises(RuntimeError):
        ours.base_model.model.up(torch.randn(3, 7))
    for name, weight in base_weights(ours).items():
        assert same_bits(weight, before[name]), name


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Net has no SHiRA or Super-Tuning layers"):
        accelerate(Net())
    lora = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match="PeftModel has no SHiRA or Super-Tuning layers"):
        accelerate(lora)
