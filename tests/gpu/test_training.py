"""Training on CUDA: the same as with dense gradients, as on the CPU, and in every way people train."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import gradsel
from gradsel.attached import selected_in
from gradsel.masks import Flat, PerRow, Whole
from tests.gpu import ON_CPU
from tests.gpu.training import Data, Net, assert_close, moved, toy, train
from tests.kernels import cases
from tests.support.hugging_face import hugging_face, model_loss
from tests.support.selections import check_consistent, check_frozen, frozen_entries, random_selection
from tests.support.toy import Toy, batches, cross_entropy

# --- Selecting ---------------------------------------------------------------------------------------------------


POLICIES = [
    gradsel.PerNeuron(2),
    gradsel.Rows(2),
    gradsel.Columns(3),
    gradsel.PerLayer(fraction=0.05),
    gradsel.Global(fraction=0.02),
]


@pytest.mark.supports("CUDA", "select")
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_selection_is_that_of_the_cpu(device, policy):
    model = Toy().double().eval()
    data = moved(batches(), "cpu", torch.float64)
    for count, memory in ((3, {"memory": "full"}), (1, {"memory": "streaming"}), (3, {"max_gradient_bytes": 12000})):
        expected = gradsel.select(model.cpu(), data[:count], cross_entropy, policy, memory="full")
        there = moved(data[:count], device, torch.float64)
        found = gradsel.select(model.to(device), there, cross_entropy, policy, **memory)
        assert set(found) == set(expected)
        for name in found:
            assert found[name].kind == expected[name].kind, name
            assert torch.equal(found[name].to_dense().cpu(), expected[name].to_dense()), name


# --- The same training as with dense gradients -------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.mix(self.embed(x))).mean(1))


def words() -> Data:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randint(0, 20, (8, 6), generator=generator), torch.randint(0, 4, (8,), generator=generator))] * 3


MODELS = {
    "ViT": (Toy, batches, cross_entropy, {"freeze": ["unused.*"]}),
    "ConvNet": (Net, batches, cross_entropy, {}),
    "Embedding": (Words, words, cross_entropy, {"rank": ["embed.weight"]}),
    "Llama": (None, None, model_loss, {}),
}


@pytest.mark.supports("CUDA", "attach", "MaskedAdam")
@pytest.mark.parametrize("kind", ["per-row", "rows", "columns", "irregular"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_curve_of_dense_training(device, float32_is_float32, name, kind):
    build, make, loss_of, rules = MODELS[name]
    torch.manual_seed(0)
    model, data = hugging_face("Llama") if build is None else (build().eval(), make())
    model, data = model.to(device), moved(data, device)
    selection = random_selection(model, kind, **rules)
    before = frozen_entries(model, selection)
    dense = copy.deepcopy(model)
    gradsel.freeze(dense, selection)
    gradsel.attach(model, selection)
    ours = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)
    theirs = torch.optim.Adam([p for p in dense.parameters() if p.requires_grad], lr=1e-3)
    masks = {name: selection[name].to_dense().to(device) for name, _ in dense.named_parameters()}
    for step in range(10):
        batch = data[step % len(data)]
        losses = []
        for trained, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss = loss_of(trained, batch)
            loss.backward()
            if trained is dense:
                for own, parameter in dense.named_parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(masks[own])
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    check_consistent(model)
    check_frozen(model, selection, before)


@pytest.mark.parametrize("kind", ["per-row", "irregular"])
def test_attached_training_is_that_of_the_cpu(device, kind):
    data = moved(batches(5), "cpu", torch.float64)
    trained = []
    for where in ("cpu", device):
        model, selection = toy("cpu", torch.float64, kind)
        gradsel.attach(model, selection)
        model.to(where)  # after attach(): masks and originals come along
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
        losses = train(model, optimizer, moved(data, where, torch.float64))
        check_consistent(model)
        trained.append((model, losses))
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-9)
    assert_close(trained[1][0], trained[0][0])
    base = toy("cpu", torch.float64)[0].state_dict()
    restored = gradsel.detach(trained[1][0], restore=True).state_dict()
    assert all(cases.same_bits(tensor.cpu(), base[name]) for name, tensor in restored.items())


def test_drop_in_training_is_that_of_the_cpu(device):
    data = moved(batches(5), "cpu", torch.float64)
    trained = []
    for where in ("cpu", device):
        model, selection = toy(where, torch.float64)
        before = frozen_entries(model, selection)
        optimizer = gradsel.MaskedAdamW(model.named_parameters(), lr=1e-2, masks=selection, anchor=0.1)
        losses = train(model, optimizer, moved(data, where, torch.float64))
        check_frozen(model, selection, before)
        trained.append((model, losses))
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-9)
    assert_close(trained[1][0], trained[0][0])


# --- Attaching and detaching -------------------------------------------------------------------------------------


@pytest.mark.supports("CUDA", "merge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attaching_and_detaching_moves_no_bit(device, dtype):
    model, selection = toy(device, dtype)
    before = copy.deepcopy(model.state_dict())
    data = moved(batches(), device, dtype)
    gradsel.attach(model, selection)
    gradsel.detach(model)
    assert all(cases.same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    gradsel.attach(model, selection)
    train(model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1), data)
    assert any((tensor != before[name]).any() for name, tensor in model.state_dict().items() if name in before)
    gradsel.detach(model, restore=True)
    assert all(cases.same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bfloat16_model_trains_float32_values(device):
    model, selection = toy(device, torch.bfloat16)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    layer = model.blocks[0].fc1
    start, weight = layer.weight_values.detach().clone(), layer._parameters["weight"].clone()
    assert start.dtype is torch.float32
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-6)  # too little for the weights
    train(model, optimizer, moved(batches(), device, torch.bfloat16))
    assert layer.weight_values.grad.dtype is torch.float32
    assert (layer.weight_values != start).float().mean() > 0.9
    assert (layer._parameters["weight"] != weight).sum() < 10
    check_consistent(model)
    check_frozen(model, selection, before)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler_skips_an_overflow(device, dtype, fused):
    model, selection = toy(device)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    for i, batch in enumerate(moved(batches(4), device)):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = cross_entropy(model, batch)
        scaler.scale(loss).backward()
        if i == 1:
            model.blocks[0].fc1.weight_values.grad.view(-1)[0] = float("inf")
        start = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert (i == 1) == all(torch.equal(p, start[name]) for name, p in model.state_dict().items())
    assert scaler.get_scale() == 4.0
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())
    check_consistent(model)
    check_frozen(model, selection, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast_are_those_of_dense_training(device, dtype):
    model, selection = toy(device)
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    (batch,) = moved(batches(1), device)
    for trained in (model, dense):
        with torch.autocast(device, dtype):
            loss = cross_entropy(trained, batch)
        loss.backward()
    for module in model.modules():
        for short, selected in selected_in(module).items():
            parameter = dense.get_parameter(selected.name)
            if parameter.grad is not None:
                found, expected = module._parameters[short + "_values"].grad, selected.mask.gather(parameter.grad)
                torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03 * float(expected.abs().max()))


def test_a_compiled_model_has_the_gradients_of_the_eager_one(device, float32_is_float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 16)).to(device)
    gradsel.attach(model, random_selection(model))
    parameters = gradsel.trainable_parameters(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = torch.randn(20, 32, device=device)
        found = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in parameters)])
        for eager, fused in zip(*found, strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)
    gradsel.MaskedAdam(parameters, lr=0.1).step()
    check_consistent(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)  # it sees the weights that were written
    torch._dynamo.reset()


# --- Low precision -----------------------------------------------------------------------------------------------


def in_16_bits(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 64), (32, 48), (50,))]
    cols = torch.rand(40, 64, generator=generator).topk(3).indices.sort(1).values.to(torch.int32)
    masks = {
        "a": PerRow(cols, (40, 64)),
        "b": Flat.from_dense(torch.rand(32, 48, generator=generator) < 0.1),
        "c": Whole((50,)),
    }
    return [(name, nn.Parameter(w.to(device))) for name, w in zip(masks, weights, strict=True)], masks


LOW_PRECISION = [*itertools.product(cases.DTYPES[1:3], ("master", "kahan", "stochastic"), (None,))]


@pytest.mark.parametrize(
    ("dtype", "how", "state_dtype"), [*LOW_PRECISION, (torch.bfloat16, "stochastic", torch.bfloat16)], ids=str
)
def test_low_precision_has_the_bits_of_the_cpu(device, dtype, how, state_dtype):
    """From the same gradients; stochastic rounding draws the same bits, too."""
    runs = []
    for where in ("cpu", device):
        named, masks = in_16_bits(where, dtype)
        options = {"betas": (0.9, 0.99), "low_precision": how, "seed": 7, "state_dtype": state_dtype}
        optimizer = gradsel.MaskedAdam(named, lr=1e-3, weight_decay=0.01, masks=masks, **options)
        generator = torch.Generator().manual_seed(5)
        for _ in range(8):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype).to(where)
            optimizer.step()
        runs.append((named, optimizer))
    for (name, left), (_, right) in zip(runs[0][0], runs[1][0], strict=True):
        assert cases.same_bits(left.detach(), right.detach().cpu()), name
        expected, found = runs[0][1].state[left], runs[1][1].state[right]
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert cases.same_bits(found[key].cpu(), tensor) if isinstance(tensor, Tensor) else found[key] == tensor
    assert ON_CPU or all(parameter.is_cuda for _, parameter in runs[1][0])
