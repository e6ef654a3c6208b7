"""Streams, and what makes the host wait for the device: nothing."""

from __future__ import annotations

import threading

import pytest
import torch

import gradsel
from tests.gpu import (
    CAPTURABLE,
    OPERATORS,
    columns,
    keep_busy,
    matrices,
    new_stream,
    no_synchronisation,
    on,
    one_of_each,
    same,
    wait,
)
from tests.gpu.training import Small, close, small, step
from tests.support.selections import random_selection

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


def test_a_step_with_a_learning_rate_on_the_device_does_not_wait(kernels, device):
    model, optimizer, check = small(device, torch.float32, **CAPTURABLE)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device=device)
    x = torch.randn(20, 32).to(device)
    for _ in range(2):
        step(model, optimizer, x)
    with no_synchronisation(device):
        for _ in range(2):
            step(model, optimizer, x)
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
