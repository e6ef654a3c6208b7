"""The same masks in every memory mode, within its memory; passes over the data that differ are refused."""

from __future__ import annotations

import dataclasses
import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import gradsel
from gradsel.masks import PerRow
from tests.gradsel.memory import peak_bytes
from tests.gradsel.toy import Toy, batches, cross_entropy

POLICIES = [
    gradsel.PerNeuron(2),
    gradsel.PerNeuron(1, columns=4),
    gradsel.PerLayer(fraction=0.05),
    gradsel.Global(fraction=0.02),
    gradsel.Rows(2),
    gradsel.Columns(3),
]


def same(first, second):
    assert set(first) == set(second)
    for name in first:
        assert first[name].kind == second[name].kind, name
        assert torch.equal(first[name].to_dense(), second[name].to_dense()), name


@pytest.mark.parametrize("criterion", ["gradient", "absolute", "fisher", "snip"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
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


class Wide(nn.Module):
    """Eight layers of a megabyte each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


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
    ranked = 512 * 512 * 5 if dtype is torch.float32 else 512 * 512 * 12  # a gradient with its scores, in float32
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


class Changing:
    """Batches that differ from pass to pass."""

    def __init__(self, change):
        self.passes, self.change = 0, change

    def __iter__(self):
        self.passes += 1
        yield from self.change(batches(), self.passes)


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        (batches(), shuffled, r"pass 2 has loss [\d.]+ in batch \d, the first had [\d.]+"),
        (Changing(lambda data, number: data[::-1] if number > 1 else data), cross_entropy, "other data in batch 1"),
        (
            Changing(lambda data, number: data[: 4 - number]),
            cross_entropy,
            "pass 2 has only 2 batches, the first had 3",
        ),
        (
            Changing(lambda data, number: data[:number]),
            cross_entropy,
            "pass 2 has more than the 1 batches of the first",
        ),
    ],
)
def test_passes_that_differ_are_refused(data, loss, message):
    model = Toy().eval()
    with pytest.raises(ValueError, match=f"must be alike, but .*{message}"):
        gradsel.select(model, data, loss, max_gradient_bytes=6000)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def calls_backward(model, batch):
    (10 * cross_entropy(model, batch)).backward()
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "streaming"}, "batches has more than one"),
        ({"memory": "streaming", "batches": iter(batches())}, "batches has more than one"),
        ({"memory": "little"}, "memory must be one of auto, full, streaming, grouped, got 'little'"),
        (
            {"memory": "full", "max_gradient_bytes": 1000},
            "max_gradient_bytes is for memory='grouped', got memory='full'",
        ),
        ({"max_gradient_bytes": 1000}, r"max_gradient_bytes=1000 is too little for \S+ alone, which needs \d+ bytes"),
        ({"max_gradient_bytes": 6000, "batches": iter(batches())}, r"only once; pass a DataLoader"),
        ({"loss_scale": 0.0}, r"loss_scale must be positive and finite, got 0\.0"),
        ({"policy": gradsel.PerLayer(fraction=1e-9)}, r"PerLayer\(fraction=1e-09\) selects nothing of the 8 ranked"),
        ({"policy": gradsel.Global(fraction=1e-9)}, r"Global\(fraction=1e-09\) selects nothing of the 8 ranked"),
        ({"memory": "streaming", "batches": []}, "batches is empty"),
        ({"memory": "grouped", "batches": iter(batches())}, "exceed half of the free memory, .* only once"),
        (
            {"criterion": lambda weight, grad: grad > 0},
            "returned torch.bool for patch_embed.weight, expected",
        ),
        ({"criterion": lambda weight, grad: None}, "returned NoneType for patch_embed.weight, expected"),
        ({"loss": calls_backward}, r"loss must not call backward\(\) itself"),
        ({"policy": "PerNeuron"}, "policy must be a policy such as"),
        ({"freeze": ["*"]}, "nothing would be trained"),
        (
            {"criterion": lambda weight, grad: grad.sum(1)},
            r"returned \[\d+\] for patch_embed.weight, expected the scores",
        ),
        ({"criterion": lambda weight, grad: grad / 0}, "the score of patch_embed.weight by .* is not finite"),
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


# --- Other ways to compute gradients -------------------------------------------------------------------------------


class Checkpointed(Wide):
    reentrant = False

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", ["full", "streaming", "grouped"])
def test_activation_checkpointing(memory, reentrant):
    torch.manual_seed(0)
    plain = Wide()
    model = Checkpointed()
    model.reentrant = reentrant
    model.load_state_dict(plain.state_dict())
    data = [torch.randn(16, 512, requires_grad=True)]

    def loss(model, batch):
        return model(batch).square().mean()

    limits = {"max_gradient_bytes": 4 * 2**20} if memory == "grouped" else {}
    found = gradsel.select(model, data, loss, memory=memory, **limits)
    same(found, gradsel.select(plain, data, loss, memory="full"))


def test_a_weight_shared_by_reentrant_segments_arrives_in_parts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    model, data = Twice(), [torch.randn(3, 4, requires_grad=True)]

    def loss(model, batch):
        return model(batch).square().mean()

    with pytest.raises(ValueError, match=r"gradient of layer.weight arrives in parts.*use_reentrant=False"):
        gradsel.select(model, data, loss, memory="streaming")
    selection = gradsel.select(model, data, loss, memory="full")
    loss(model, data[0]).backward()
    assert torch.equal(selection["layer.weight"].cols.long(), model.layer.weight.grad.abs().argmax(1, keepdim=True))


def test_tied_weights_stream_their_whole_gradient():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    data = [torch.randn(5, 6)]

    def loss(model, batch):
        return model(batch).square().mean()

    selection = gradsel.select(model, data, loss, memory="streaming")
    loss(model, data[0]).backward()
    assert torch.equal(selection["0.weight"].cols.long(), model[0].weight.grad.abs().argmax(1, keepdim=True))


def tiny_loss(model, batch):
    with torch.autocast("cpu", torch.float16):
        logits = model(batch[0])
    return 1e-9 * cross_entropy(lambda _: logits.float(), batch)


def test_float16_underflow_is_reported_and_loss_scale_mends_it():
    model = Toy().eval()
    with pytest.warns(UserWarning, match=r"neurons score zero everywhere .* raise loss_scale"):
        lost = gradsel.select(model, batches(), tiny_loss)
    assert lost.notes["neurons that score zero"] > 0
    assert lost.notes["gradient entries that are zero"].endswith(" %")
    scaled = gradsel.select(model, batches(), tiny_loss, loss_scale=2.0**30)
    assert "neurons that score zero" not in scaled.notes
    exact = gradsel.select(model, batches(), cross_entropy)
    rows = [(scaled[n].cols == exact[n].cols).float().mean() for n in exact if isinstance(exact[n], PerRow)]
    assert min(rows) > 0.8
    with pytest.raises(ValueError, match=r"gradient of \S+ is not finite .*lower loss_scale=1.8\d+e\+19"):
        gradsel.select(model, batches(), tiny_loss, loss_scale=2.0**64)


def test_a_hook_of_the_callers_would_act_on_our_gradients():
    model = Toy().eval()
    handle = model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    gradsel.select(model, batches(), cross_entropy)  # the head is not ranked
    handle.remove()
    handle = model.blocks[0].fc1.weight.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    with pytest.raises(ValueError, match=r"blocks.0.fc1.weight has a hook of its own that acts on gradients"):
        gradsel.select(model, batches(), cross_entropy)
    handle.remove()
    gradsel.select(model, batches(), cross_entropy)


def test_a_criterion_that_writes_changes_no_weight():
    model = Toy().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradsel.select(model, batches(), cross_entropy, criterion=lambda weight, grad: weight.mul_(grad))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@dataclasses.dataclass(slots=True)
class Record:
    images: torch.Tensor
    labels: torch.Tensor
    extra: object


@pytest.mark.parametrize(
    "extra",
    [
        numpy.array(["a", "b"]), numpy.array(["2020-01-01"], dtype="datetime64[D]"), numpy.arange(6)[::-1],
        torch.eye(3).to_sparse(), numpy.array([object()]), {"n": numpy.int64(3)}, Record, object(), 2j, None,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_batches_of_any_kind_can_be_grouped(extra):
    model = Toy().eval()
    data = [Record(images, labels, extra) for images, labels in batches()]

    def loss(model, batch):
        return cross_entropy(model, (batch.images, batch.labels))

    expected = gradsel.select(model, data, loss, memory="full")
    assert gradsel.select(model, data, loss, max_gradient_bytes=6000) == expected
    changed = Changing(lambda _, number: [Record(b.images, b.labels, number) for b in data])
    with pytest.raises(ValueError, match="other data in batch 1"):
        gradsel.select(model, changed, loss, max_gradient_bytes=6000)


def test_half_precision_scores_are_squared_and_summed_in_float32():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        model = nn.Linear(300, 200, bias=False).half()
        model.weight.data.mul_(scale)
        squares = model.weight.detach().double().square()
        for policy, dim in ((gradsel.Rows(20), 1), (gradsel.Columns(20), 0)):
            (found,) = gradsel.select(model, None, None, policy, "magnitude")["weight"].tensors().values()
            sums = squares.sum(dim)
            assert sums[found.long()].min() >= sums.topk(20).values.min() * (1 - 1e-5)


def test_nan_weights_are_blamed():
    model = nn.Linear(3, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weight weight is not finite \(1 of 6 entries\); load the model again"):
        gradsel.select(model, None, None, criterion="magnitude")


def test_random_scores_do_not_depend_on_the_default_dtype_or_device():
    model = nn.Linear(4096, 8)
    expected = gradsel.select(model, None, None, criterion="random")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert gradsel.select(model, None, None, criterion="random") == expected
    finally:
        torch.set_default_dtype(before)


def test_the_share_of_zero_gradients_is_counted():
    model = nn.Linear(64, 64, bias=False)
    data = torch.randn(10, 64)
    data[:, 0] = 0
    selection = gradsel.select(model, [data], lambda model, batch: model(batch).square().mean())
    assert selection.notes["gradient entries that are zero"] == "1.6 %"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("arguments", [{}, {"offload": True}, {"max_gradient_bytes": 9000}], ids=str)
def test_on_cuda(arguments):
    model = Toy().cuda()
    data = [(images.cuda(), labels.cuda()) for images, labels in batches()]
    found = gradsel.select(model, data, cross_entropy, **arguments)
    assert all(mask.device.type == "cuda" for mask in found.values() if mask.tensors())
    assert found == gradsel.select(model, data, cross_entropy, memory="full")
