"""The same masks in every memory mode, within its memory; passes over the data that differ are refused."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gradsel
from tests.gradsel.ranking.cases import Changing, Wide, same
from tests.support.memory import peak_bytes
from tests.support.toy import Toy, batches, cross_entropy

POLICIES = [
    gradsel.PerNeuron(2),
    gradsel.PerNeuron(1, columns=4),
    gradsel.ByMass(2),
    gradsel.PerLayer(fraction=0.05),
    gradsel.Global(fraction=0.02),
    gradsel.Rows(2),
    gradsel.Columns(3),
]


@pytest.mark.supports("offload", "select")
@pytest.mark.parametrize(
    ("policy", "criterion"),
    [
        pytest.param(policy, criterion, id=f"{policy}-{criterion}")
        for policy in POLICIES
        for criterion in ("gradient", "absolute", "fisher", "relative", "snip")
        if not (criterion == "relative" and isinstance(policy, gradsel.Columns))  # which is refused
    ],
)
def test_the_same_masks_in_every_mode(policy, criterion):
    model = Toy()  # in training mode: dropout must be replayed
    data = batches()
    full = gradsel.select(model, data, cross_entropy, policy, criterion, memory="full")
    assert full.notes["memory"].startswith("full: one pass")
    for limit in (5000, 9000):
        grouped = gradsel.select(model, data, cross_entropy, policy, criterion, max_gradient_bytes=limit)
        assert grouped.notes["memory"].startswith("grouped: ")
        same(grouped, full)
    assert grouped.notes["batches"] == full.notes["batches"] == 3
    offloaded = gradsel.select(model, data, cross_entropy, policy, criterion, memory="full", offload=True)
    same(offloaded, full)
    one = data[:1]
    streaming = gradsel.select(model, one, cross_entropy, policy, criterion, memory="streaming")
    same(streaming, gradsel.select(model, one, cross_entropy, policy, criterion, memory="full"))


@pytest.mark.supports("bf16", "select")
@pytest.mark.supports("fp16", "select")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_streaming_in_half_precision(dtype):
    model = Toy().eval().to(dtype)
    one = [(images.to(dtype), labels) for images, labels in batches(1)]
    for policy in POLICIES:
        same(*(gradsel.select(model, one, cross_entropy, policy, memory=memory) for memory in ("streaming", "full")))


def test_auto_streams_a_single_batch_and_says_so():
    model = Toy().eval()
    one = gradsel.select(model, batches(1), cross_entropy)
    assert one.notes["memory"].startswith("streaming: ")
    assert "memory streaming: " in str(one)
    two = gradsel.select(model, batches(2), cross_entropy)
    assert two.notes["memory"] == "full: one pass, 10,512 bytes of gradient sums held"


def test_auto_plans_by_the_free_memory(monkeypatch):
    model = Toy().eval()
    expected = gradsel.select(model, batches(), cross_entropy)
    monkeypatch.setattr("gradsel.ranking.planning._free_on", lambda device: 12000)
    found = gradsel.select(model, batches(), cross_entropy)
    assert found.notes["memory"].startswith("grouped: ")
    assert "at most 6,000 bytes" in found.notes["memory"]
    same(found, expected)
    monkeypatch.setattr("gradsel.ranking.planning._free_on", lambda device: 10)  # a single gradient has to fit anyway
    same(gradsel.select(model, batches(), cross_entropy), expected)
    only_once = gradsel.select(model, iter(batches()), cross_entropy)  # nothing else is possible
    assert only_once.notes["memory"].startswith("full: ")
    monkeypatch.setattr("gradsel.ranking.planning._free_on", lambda device: None)
    assert gradsel.select(model, batches(), cross_entropy).notes["memory"].startswith("full: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(dtype):
    model = Wide().to(dtype)
    data = [torch.randn(64, 512, dtype=dtype) for _ in range(2)]
    layer, weights = 512 * 512 * dtype.itemsize, 8 * 512 * 512 * dtype.itemsize

    def loss(model, batch):
        return model(batch).float().square().mean()

    def peak(count, **arguments):
        return peak_bytes(lambda: gradsel.select(model, data[:count], loss, gradsel.PerNeuron(1), **arguments))

    activations = peak_bytes(lambda: loss(model, data[0]))
    ranked = 512 * 512 * 5 if dtype is torch.float32 else 512 * 512 * 12  # a gradient and its scores, in float32
    assert weights + peak(1, memory="streaming") <= 1.05 * (weights + layer + activations) + max(0, ranked - layer)
    full = 8 * 512 * 512 * 4
    assert full <= peak(2, memory="full") <= full + activations + 2 * ranked
    limit = 4 * 512 * 512 * 4
    assert peak(2, max_gradient_bytes=limit) <= limit + activations + ranked
    assert peak(2, memory="full") > peak(2, max_gradient_bytes=limit) > peak(1, memory="streaming")


def test_grouped_replays_all_global_random_numbers_and_a_loaders_own():
    model = Toy()
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(images, labels), 10, shuffle=True, generator=torch.Generator().manual_seed(3))

    def noisy(model, batch):
        scale = 1 + 0.1 * random.random() + 0.1 * float(numpy.random.rand())
        return cross_entropy(model, (batch[0] * scale + 0.1 * torch.randn_like(batch[0]), batch[1]))

    state = loader.generator.get_state()
    python, numbers, torches = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    full = gradsel.select(model, loader, noisy, memory="full")
    assert random.getstate() == python
    assert numpy.array_equal(numpy.random.get_state()[1], numbers[1])
    assert torch.equal(torch.get_rng_state(), torches)
    loader.generator.set_state(state)
    same(gradsel.select(model, loader, noisy, max_gradient_bytes=6000), full)


def test_grouped_sees_the_same_batch_statistics_in_every_pass():
    model = Toy()

    def loss(model, batch):  # depends on the running statistics that forward in training mode changes
        model.train()
        model(batch[0])
        model.eval()
        return cross_entropy(model, batch)

    full = gradsel.select(model, batches(), loss, memory="full")
    same(gradsel.select(model, batches(), loss, max_gradient_bytes=6000), full)


def shuffled(model, batch, generator=torch.Generator()):  # noqa: B008
    return cross_entropy(model, (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator), batch[1]))


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        (batches(), shuffled, r"pass 2 .*loss [\d.]+ in batch \d"),
        (Changing(lambda data, number: data[::-1] if number > 1 else data), cross_entropy, "batch 1"),
        (
            Changing(lambda data, number: data[: 4 - number]),
            cross_entropy,
            "pass 2 .*2 batches.*3",
        ),
        (
            Changing(lambda data, number: data[:number]),
            cross_entropy,
            "pass 2 .*more than .*1 batch",
        ),
    ],
)
def test_passes_that_differ_are_refused(data, loss, message):
    model = Toy().eval()
    with pytest.raises(ValueError, match=f"alike.*{message}"):
        gradsel.select(model, data, loss, max_gradient_bytes=6000)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def calls_backward(model, batch):
    (10 * cross_entropy(model, batch)).backward()
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "streaming"}, "batches .*more than one"),
        ({"memory": "streaming", "batches": iter(batches())}, "batches .*more than one"),
        ({"memory": "little"}, "memory .*auto, full, streaming, grouped.*'little'"),
        (
            {"memory": "full", "max_gradient_bytes": 1000},
            "max_gradient_bytes .*memory='grouped'.*memory='full'",
        ),
        ({"max_gradient_bytes": 1000}, r"max_gradient_bytes=1000 .*needs \d+ bytes"),
        ({"max_gradient_bytes": 6000, "batches": iter(batches())}, "only once.*DataLoader"),
        ({"loss_scale": 0.0}, r"loss_scale .*0\.0"),
        ({"policy": gradsel.PerLayer(fraction=1e-9)}, r"PerLayer\(fraction=1e-09\) .*nothing"),
        ({"policy": gradsel.Global(fraction=1e-9)}, r"Global\(fraction=1e-09\) .*nothing"),
        ({"memory": "streaming", "batches": []}, "batches .*empty"),
        ({"memory": "grouped", "batches": iter(batches())}, "free memory.* only once"),
        (
            {"criterion": lambda weight, grad: grad > 0},
            r"torch\.bool for patch_embed\.weight",
        ),
        ({"criterion": lambda weight, grad: None}, r"NoneType for patch_embed\.weight"),
        ({"loss": calls_backward}, r"loss .*backward\(\)"),
        ({"policy": "PerNeuron"}, "policy such as"),
        ({"freeze": ["*"]}, "nothing .*trained"),
        (
            {"criterion": lambda weight, grad: grad.sum(1)},
            r"\[\d+\] for patch_embed\.weight",
        ),
        ({"criterion": lambda weight, grad: grad / 0}, r"score of patch_embed\.weight .*not finite"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message, monkeypatch):
    monkeypatch.setattr("gradsel.ranking.planning._free_on", lambda device: 12000)
    model = Toy().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        gradsel.select(model, **{"batches": batches(), "loss": cross_entropy, **arguments})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("arguments", [{}, {"offload": True}, {"max_gradient_bytes": 9000}], ids=str)
def test_on_cuda(arguments):
    model = Toy().cuda()
    data = [(images.cuda(), labels.cuda()) for images, labels in batches()]
    found = gradsel.select(model, data, cross_entropy, **arguments)
    assert all(mask.device.type == "cuda" for mask in found.values() if mask.tensors())
    assert found == gradsel.select(model, data, cross_entropy, memory="full")
