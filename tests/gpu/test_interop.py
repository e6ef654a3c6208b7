"""What surrounds the kernels on CUDA: checkpoints and deltas between devices, copies, the allocator, odd gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Flat, PerRow, Whole
from tests.gpu import ON_CPU
from tests.gpu.training import Net, assert_close, attached, moved, toy, train
from tests.kernels import cases
from tests.support.selections import check_consistent, check_frozen, frozen_entries, random_selection
from tests.support.toy import batches, cross_entropy


def through_a_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


# --- Between devices ---------------------------------------------------------------------------------------------


@pytest.mark.supports("CUDA", "save/load")
def test_a_checkpoint_goes_to_the_cpu_and_back(device):
    data = moved(batches(6), "cpu", torch.float64)
    model, optimizer = attached(device, torch.float64, amsgrad=True, anchor=0.1)
    train(model, optimizer, moved(data[:2], device, torch.float64))
    saved = through_a_file((model.state_dict(), optimizer.state_dict()), map_location="cpu", weights_only=True)

    here, resumed = attached("cpu", torch.float64, amsgrad=True, anchor=0.1)
    here.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    check_consistent(here)
    back, again = attached(device, torch.float64, amsgrad=True, anchor=0.1)
    back.load_state_dict(through_a_file(here.state_dict()))
    again.load_state_dict(through_a_file(resumed.state_dict()))
    for left, right in zip(optimizer.state.values(), again.state.values(), strict=True):
        for key, tensor in left.items():
            if isinstance(tensor, Tensor):
                assert right[key].device == tensor.device, key
                assert cases.same_bits(right[key], tensor), key

    losses = [
        train(*run, moved(data[2:], where, torch.float64))
        for run, where in (((model, optimizer), device), ((here, resumed), "cpu"), ((back, again), device))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)
    assert_close(here, model)
    assert_close(back, model)


@pytest.mark.supports("CUDA", "delta")
@pytest.mark.parametrize("kind", ["per-row", "irregular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_delta_is_the_same_on_every_device(device, dtype, kind, tmp_path):
    base, selection = toy(device, dtype, kind)
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    train(model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1), moved(batches(), device, dtype))
    gradsel.save_delta(model, tmp_path / "there")
    gradsel.save_delta(copy.deepcopy(model).cpu(), tmp_path / "here")
    delta = gradsel.Delta.load(tmp_path / "there")
    assert delta == gradsel.Delta.load(tmp_path / "here")
    trained = gradsel.detach(model).state_dict()
    for plain in (base, copy.deepcopy(base).cpu()):
        before = copy.deepcopy(plain.state_dict())
        with delta.applied(plain):
            for name, tensor in plain.state_dict().items():
                assert cases.same_bits(tensor.cpu(), trained[name].cpu()), name
        assert all(cases.same_bits(tensor, before[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_attached_models_of_their_own(device, way):
    model, _ = attached(device)
    if way == "deepcopy":
        made = copy.deepcopy(model)
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        made = through_a_file(model, weights_only=False)
    before = copy.deepcopy(model.state_dict())
    assert all(parameter.device.type == device for parameter in made.parameters())
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(made), lr=0.1)
    train(made, optimizer, moved(batches(2), device))
    check_consistent(made)
    assert not torch.equal(made.blocks[0].fc1.weight_values, model.blocks[0].fc1.weight_values)
    assert all(cases.same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    gradsel.detach(made, restore=True)
    assert cases.same_bits(made.blocks[0].fc1.weight.detach(), before["blocks.0.fc1.weight"])


def test_a_model_that_moves_between_steps(device):
    """The optimizer's state stays where it was made, as in torch: to move on, it is saved and loaded."""
    data = moved(batches(4), "cpu", torch.float64)
    model, optimizer = attached("cpu", torch.float64)
    expected = train(model, optimizer, data)
    model, optimizer = attached("cpu", torch.float64)
    losses = train(model, optimizer, data[:2])
    model.to(device)
    state = optimizer.state_dict()
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    optimizer.load_state_dict(state)
    losses += train(model, optimizer, moved(data[2:], device, torch.float64))
    assert losses == pytest.approx(expected, rel=1e-9)
    check_consistent(model)


# --- The allocator -----------------------------------------------------------------------------------------------

STEPS = 100  # more tables of addresses than a backend would keep


def parameters(device: str, dtype: torch.dtype = torch.float32):
    """Named parameters and their masks, the same every time."""
    generator = torch.Generator().manual_seed(4)
    cols = torch.rand(40, 64, generator=generator).topk(3).indices.sort(1).values.to(torch.int32)
    masks = {
        "a": PerRow(cols, (40, 64)),
        "b": Flat.from_dense(torch.rand(32, 48, generator=generator) < 0.1),
        "c": Whole((50,)),
    }
    named = [
        (name, nn.Parameter(torch.randn(mask.shape, generator=generator).to(device, dtype)))
        for name, mask in masks.items()
    ]
    return named, masks


def followed(given: list[list[Tensor]]):
    """The same parameters after steps on the CPU, with gradients in one place."""
    named, masks = parameters("cpu")
    optimizer = gradsel.MaskedAdam(named, lr=1e-2, weight_decay=0.1, masks=masks)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    with gk.use_backend("native"):
        for grads in given:
            for (_, parameter), grad in zip(named, grads, strict=True):
                parameter.grad.copy_(grad)
            optimizer.step()
    return named


def same_parameters(left, right) -> bool:
    return all(cases.same_bits(a.detach().cpu(), b.detach().cpu()) for (_, a), (_, b) in zip(left, right, strict=True))


@pytest.mark.parametrize("keep", [0, 7, STEPS])
def test_gradients_in_new_places_at_every_step(kernels, device, keep):
    """Memory that is used again for another gradient, another size, or not at all while the step is on its way."""
    named, masks = parameters(device)
    optimizer = gradsel.MaskedAdam(named, lr=1e-2, weight_decay=0.1, masks=masks)
    held, places, given = [], set(), []
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        given.append([torch.randn(p.shape, generator=generator) for _, p in named])
        for (_, parameter), grad in zip(named, given[-1], strict=True):
            held.append(torch.full((1 + 997 * step % 5000,), float("nan"), device=device))
            parameter.grad = grad.to(device)
            held.append(parameter.grad)
            places.add(parameter.grad.data_ptr())
        optimizer.step()
        del held[: max(0, len(held) - 6 * keep)]
    assert keep == 0 or len(places) > len(named)
    assert same_parameters(named, followed(given))


@pytest.mark.skipif(ON_CPU, reason="there are no memory pools on the CPU")
def test_gradients_from_a_memory_pool(kernels, device):
    named, masks = parameters(device)
    optimizer = gradsel.MaskedAdam(named, lr=1e-2, weight_decay=0.1, masks=masks)
    given = []
    for _ in range(4):
        given.append([torch.randn(p.shape) for _, p in named])
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            for (_, parameter), grad in zip(named, given[-1], strict=True):
                parameter.grad = grad.to(device)
        optimizer.step()
        optimizer.zero_grad()  # gives the memory back to its pool, and that to the device, behind the step
        del pool
    assert same_parameters(named, followed(given))


def test_attached_training_between_other_allocations(kernels, device):
    data = moved(batches(3), device, torch.float64) * 10
    model, optimizer = attached(device, torch.float64)
    expected = train(model, optimizer, data)
    other, optimizer = attached(device, torch.float64)
    losses, held = [], []
    for i, batch in enumerate(data):
        held.append([torch.full((j * (i % 5) + 1,), float("nan"), device=device) for j in (10, 1000, 100_000)])
        losses += train(other, optimizer, [batch])
        if i % 3 == 0:
            held.clear()
            if device == "cuda":
                torch.cuda.empty_cache()
    assert losses == pytest.approx(expected, rel=1e-9)
    assert_close(other, model)


# --- Gradients and weights with strides of their own -------------------------------------------------------------


def part_of_a_buffer(grad: Tensor) -> Tensor:
    """A view as distributed wrappers make them, at an odd address."""
    return torch.cat([grad.new_full((3,), float("nan")), grad.reshape(-1)])[3:].view(grad.shape)


def transposed(grad: Tensor) -> Tensor:
    return grad.t().contiguous().t() if grad.ndim == 2 else grad


def spaced(grad: Tensor) -> Tensor:
    return torch.stack([grad, torch.full_like(grad, float("nan"))], -1)[..., 0]


def expanded(grad: Tensor) -> Tensor:
    return grad[:1].expand(grad.shape)


@pytest.mark.parametrize("view", [part_of_a_buffer, transposed, spaced, expanded], ids=lambda view: view.__name__)
def test_gradients_that_are_views(kernels, device, view):
    named, masks = parameters(device)
    optimizer = gradsel.MaskedAdam(named, lr=1e-2, weight_decay=0.1, masks=masks)
    generator = torch.Generator().manual_seed(5)
    given = []
    for _ in range(3):
        given.append([torch.randn(p.shape, generator=generator) for _, p in named])
        for (_, parameter), grad in zip(named, given[-1], strict=True):
            parameter.grad = view(grad.to(device))
        if view is expanded:
            given[-1] = [expanded(grad) for grad in given[-1]]
        optimizer.step()
    assert same_parameters(named, followed(given))


@pytest.mark.parametrize("kind", ["per-row", "irregular", "rows", "columns"])
@pytest.mark.parametrize("route", ["attached", "drop-in"])
def test_convolutions_in_channels_last(device, route, kind):
    """Their weights are no matrices with strides: entries are found through offsets."""
    torch.manual_seed(0)
    plain = Net().double()
    selection = random_selection(plain, kind)
    data = moved(batches(4), "cpu", torch.float64)
    trained = []
    for where, memory in (("cpu", torch.contiguous_format), (device, torch.channels_last)):
        model = copy.deepcopy(plain).to(where).to(memory_format=memory)
        before = frozen_entries(model, selection)
        if route == "attached":
            gradsel.attach(model, selection)
            optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
        else:
            optimizer = gradsel.MaskedAdam(model.named_parameters(), lr=1e-2, masks=selection)
        images = [(x.to(where).contiguous(memory_format=memory), y.to(where)) for x, y in data]
        losses = train(model, optimizer, images)
        check_consistent(model)
        check_frozen(model, selection, before)
        trained.append((model, losses))
    weight = trained[1][0].first._parameters["weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-9)
    assert_close(trained[1][0], trained[0][0])


def test_gradients_that_are_accumulated(device):
    data = moved(batches(2), device, torch.float64)
    model, optimizer = attached(device, torch.float64)
    other, twin = attached(device, torch.float64)
    for batch in data:
        cross_entropy(model, batch).backward()
    sum(cross_entropy(other, batch) for batch in data).backward()
    optimizer.step(), twin.step()
    assert_close(model, other)
