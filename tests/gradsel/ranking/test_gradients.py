"""Gradients that arrive in unusual ways: checkpointed, shared, scaled, with hooks, in float16."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.masks import PerRow
from tests.gradsel.ranking.cases import Changing, Wide, same
from tests.support.toy import Toy, batches, cross_entropy


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

    with pytest.raises(ValueError, match=r"layer\.weight .*use_reentrant=False"):
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


@pytest.mark.supports("autocast", "select")
def test_float16_underflow_is_reported_and_loss_scale_mends_it():
    model = Toy().eval()
    with pytest.warns(UserWarning, match=r"zero .*raise loss_scale"):
        lost = gradsel.select(model, batches(), tiny_loss)
    assert lost.notes["neurons that score zero"] > 0
    assert lost.notes["gradient entries that are zero"].endswith(" %")
    scaled = gradsel.select(model, batches(), tiny_loss, loss_scale=2.0**30)
    assert "neurons that score zero" not in scaled.notes
    exact = gradsel.select(model, batches(), cross_entropy)
    rows = [(scaled[n].cols == exact[n].cols).float().mean() for n in exact if isinstance(exact[n], PerRow)]
    assert min(rows) > 0.8
    with pytest.raises(ValueError, match=r"not finite .*loss_scale=1\.8\d+e\+19"):
        gradsel.select(model, batches(), tiny_loss, loss_scale=2.0**64)


def test_a_hook_of_the_callers_would_act_on_our_gradients():
    model = Toy().eval()
    handle = model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    gradsel.select(model, batches(), cross_entropy)  # the head is not ranked
    handle.remove()
    handle = model.blocks[0].fc1.weight.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1\.weight .*hook"):
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
    with pytest.raises(ValueError, match="batch 1"):
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
    with pytest.raises(ValueError, match=r"weight weight .*not finite \(1 of 6 .*load the model"):
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
