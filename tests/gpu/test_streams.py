"""Streams, CUDA graphs, and what makes the host wait for the device: nothing."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.gpu import (
    ON_CPU,
    OPERATORS,
    SIZE,
    Captured,
    columns,
    copy_gradients,
    differing,
    keep_busy,
    new_stream,
    no_synchronisation,
    on,
    one_of_each,
    wait,
)
from tests.kernels import cases
from tests.support.selections import check_consistent, check_frozen, frozen_entries, random_selection

needs_cuda = pytest.mark.skipif(ON_CPU, reason="there are no CUDA graphs on the CPU")


def matrices(device: str, count: int) -> list[Tensor]:
    return [torch.randn(SIZE, SIZE).to(device) for _ in range(count)]


def same(left, right) -> bool:
    return all(cases.same_bits(a, b) for a, b in zip(left, right, strict=True))


# --- Streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_runs_behind_what_its_stream_has_to_do(kernels, device, operator):
    """On another stream than the data's it would read what was there before."""
    run, cols = OPERATORS[operator], columns(device)
    (fresh,) = matrices(device, 1)
    data = torch.zeros_like(fresh)
    expected, stale = run(fresh, cols), run(data, cols)
    assert not same(expected, stale)
    stream = new_stream(device)
    wait(device)
    with on(stream):
        keep_busy(device)
        data.copy_(fresh)
        found = run(data, cols)
    wait(device)
    assert same(found, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_streams_at_once(kernels, device, operator):
    run, cols = OPERATORS[operator], columns(device)
    data = matrices(device, 2)
    expected = [run(x, cols) for x in data]
    streams = [new_stream(device) for _ in data]
    found = []
    wait(device)
    for stream in streams:
        with on(stream):
            keep_busy(device)
    for _ in range(10):
        for i, stream in enumerate(streams):
            with on(stream):
                found.append((i, run(data[i], cols)))
    wait(device)
    for i, result in found:
        assert same(result, expected[i])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_thread_that_has_not_used_the_device_before(kernels, device, operator):
    """As those of the autograd engine, whose first call this may be."""
    run, cols = OPERATORS[operator], columns(device)
    (data,) = matrices(device, 1)
    expected, found = run(data, cols), []
    thread = threading.Thread(target=lambda: found.append(run(data, cols)))
    thread.start()
    thread.join()
    wait(device)
    assert len(found) == 1
    assert same(found[0], expected)


class Small(nn.Module):
    """Layers of the direct route, whose steps are cheap to repeat."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(32, width), nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(nn.functional.gelu(self.first(x))))


def small(device: str, dtype: torch.dtype, **options):
    """An attached model and its optimizer."""
    torch.manual_seed(0)
    model = Small().to(device, dtype)
    selection = random_selection(model)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2, **options)
    return model, optimizer, lambda: (check_consistent(model), check_frozen(model, selection, before))


def close(left: nn.Module, right: nn.Module, tolerance: float) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_training_on_a_side_stream(kernels, device):
    inputs = [torch.randn(20, 32, dtype=torch.float64).to(device) for _ in range(5)]
    model, optimizer, _ = small(device, torch.float64)
    expected = torch.stack([step(model, optimizer, x) for x in inputs])
    other, optimizer, check = small(device, torch.float64)
    stream = new_stream(device)
    wait(device)
    with on(stream):
        keep_busy(device)
        found = torch.stack([step(other, optimizer, x) for x in inputs])
    wait(device)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    close(other, model, 1e-8)
    check()


# --- Nothing waits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_waits_for_the_device(kernels, device, operator):
    run, cols = OPERATORS[operator], columns(device)
    (x,) = matrices(device, 1)
    run(x, cols)
    with no_synchronisation(device):
        run(x, cols)


def test_a_step_with_gradients_in_new_places_does_not_wait(kernels, device):
    problem = one_of_each(torch.float32).to(device)
    options = {"grad_scale": torch.tensor(2.0, device=device), "found_inf": torch.zeros((), device=device)}
    kept = []

    def run() -> None:
        for _ in range(3):
            kept.append(problem.grads)
            problem.grads = [grad.clone() for grad in problem.grads]
            problem.step(weight_decay=0.1, **options)

    run()
    with no_synchronisation(device):
        run()


@pytest.mark.parametrize("fused", [None, True])
def test_an_attached_step_does_not_wait(kernels, device, fused):
    """With fused=True not even for a GradScaler's verdict."""
    model, optimizer, check = small(device, torch.float32, fused=fused)
    x = torch.randn(20, 32).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0) if fused else None

    def run() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    for _ in range(2):
        run()
    with no_synchronisation(device):
        for _ in range(2):
            run()
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_drop_in_step_does_not_wait(kernels, device, dtype):
    model = Small().to(device, dtype)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=random_selection(model), weight_decay=0.1)
    x = torch.randn(20, 32, dtype=dtype).to(device)
    for _ in range(2):
        step(model, optimizer, x)
    with no_synchronisation(device):
        for _ in range(2):
            step(model, optimizer, x)


# --- CUDA graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if name.startswith(("topk", "selected", "gather", "take"))]
)
def test_a_replay_computes_with_new_data(kernels, device, operator):
    run, cols = OPERATORS[operator], columns(device)
    data, *others = matrices(device, 4)
    expected = [run(x, cols) for x in others]
    captured = Captured(device, lambda: run(data, cols))
    for x, result in zip(others, expected, strict=True):
        data.copy_(x)
        captured.replay()
        assert same(captured.result, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_of_a_step_are_steps(graph_kernels, device, dtype):
    """Steps are counted on the device, and so is what is skipped for an infinity."""
    eager = one_of_each(dtype).round("stochastic").to(device)
    graphed, warm = eager.to(device), eager.to(device)
    found = torch.zeros((), device=device)
    options = {"amsgrad": True, "weight_decay": 0.1, "grad_scale": torch.tensor(4.0, device=device)}
    warm.step(found_inf=found, **options)
    captured = Captured(device, lambda: graphed.step(found_inf=found, **options))
    assert [float(count) for count in graphed.steps] == [3.0] * len(graphed.steps)
    for number in range(6):
        eager.new_gradients()
        copy_gradients(eager, graphed)
        found.fill_(float(number == 3))
        captured.replay()
        eager.step(found_inf=found, **options)
        assert differing(graphed, eager) == []
    assert [float(count) for count in graphed.steps] == [8.0] * len(graphed.steps)


def test_replays_of_a_step_of_many_tensors_are_steps(graph_kernels, device):
    problem = one_of_each(torch.float32)
    for _ in range(60):
        more = one_of_each(torch.float32, (Layout.COLS,), shape=(8, 20))
        for name, tensors in vars(more).items():
            getattr(problem, name).extend(tensors)
    eager = problem.to(device)
    graphed, warm = eager.to(device), eager.to(device)
    warm.step()
    captured = Captured(device, graphed.step)
    for _ in range(3):
        eager.new_gradients()
        copy_gradients(eager, graphed)
        captured.replay()
        eager.step()
    assert differing(graphed, eager) == []


@needs_cuda
def test_the_triton_backend_refuses_to_be_captured(device):
    with gk.use_backend("triton"):
        problem = one_of_each(torch.float32).to(device)
        problem.step()
        before = problem.to(device)
        scratch = torch.zeros(4, device=device)

        def run() -> None:
            scratch.add_(1)  # an empty graph would be warned of
            problem.step()

        with pytest.raises(RuntimeError, match=r"masked_adam_ .*CUDA graph"):
            Captured(device, run)
        assert differing(problem, before) == []
        problem.step()  # the device is as usable as before
        assert differing(problem, before) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_captured_training_step_trains(graph_kernels, device, dtype):
    inputs = [torch.randn(20, 32, dtype=dtype).to(device) for _ in range(8)]
    options = {} if ON_CPU else {"capturable": True}
    eager, optimizer, _ = small(device, dtype, **options)
    expected = [step(eager, optimizer, x).item() for x in inputs]

    model, optimizer, check = small(device, dtype, **options)
    x = inputs[0].clone()
    stream = new_stream(device)  # as CUDA graphs want it: the first steps on a side stream
    wait(device)
    with on(stream):
        found = []
        for given in inputs[:3]:
            x.copy_(given)
            found.append(step(model, optimizer, x).item())
    wait(device)
    optimizer.zero_grad()
    captured = Captured(device, lambda: step(model, optimizer, x))
    for given in inputs[3:]:
        x.copy_(given)
        captured.replay()
        found.append(captured.result.item())
    assert found == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-10)
    close(model, eager, 1e-4 if dtype is torch.float32 else 1e-8)
    for state in optimizer.state.values():
        assert float(state["step"]) == len(inputs)
    check()


def test_a_captured_optimizer_can_be_copied_and_goes_on(graph_kernels, device):
    """What a graph has stepped is state like any other: an eager step goes on from it."""
    model, optimizer, check = small(device, torch.float64, **({} if ON_CPU else {"capturable": True}))
    x = torch.randn(20, 32, dtype=torch.float64).to(device)
    wait(device)
    with on(new_stream(device)):
        step(model, optimizer, x)
    wait(device)
    captured = Captured(device, lambda: step(model, optimizer, x))
    captured.replay()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wait(device)
    step(model, optimizer, x)
    other, resumed, _ = small(device, torch.float64)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    step(other, resumed, x)
    close(other, model, 1e-8)
    check()
