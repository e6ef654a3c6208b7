"""Steps and operators in CUDA graphs: a replay is what an eager call is."""

from __future__ import annotations

import copy

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.gpu import (
    CAPTURABLE,
    ON_CPU,
    OPERATORS,
    Captured,
    columns,
    copy_gradients,
    differing,
    matrices,
    new_stream,
    on,
    one_of_each,
    same,
    wait,
)
from tests.gpu.training import close, small, step

needs_cuda = pytest.mark.skipif(ON_CPU, reason="there are no CUDA graphs on the CPU")


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if name.startswith(("topk_rows", "selected", "gather", "take"))]
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
def test_replays_of_a_step_are_steps(kernels, device, dtype):
    """Steps are counted on the device, and so is what is skipped for an infinity."""
    eager = one_of_each(dtype).round("stochastic").to(device)
    graphed = eager.to(device)
    found = torch.zeros((), device=device)
    options = {"amsgrad": True, "weight_decay": 0.1, "grad_scale": torch.tensor(4.0, device=device)}
    for problem in (eager, graphed):
        problem.step(found_inf=found, **options)
    captured = Captured(device, lambda: graphed.step(found_inf=found, **options))
    assert [float(count) for count in graphed.steps] == [4.0] * len(graphed.steps)
    for number in range(6):
        eager.new_gradients()
        copy_gradients(eager, graphed)
        found.fill_(float(number == 3))
        captured.replay()
        eager.step(found_inf=found, **options)
        assert differing(graphed, eager) == []
    assert [float(count) for count in graphed.steps] == [9.0] * len(graphed.steps)


def test_replays_of_a_step_of_many_tensors_are_steps(kernels, device):
    problem = one_of_each(torch.float32)
    for _ in range(60):
        more = one_of_each(torch.float32, (Layout.COLS,), shape=(8, 20))
        for name, tensors in vars(more).items():
            getattr(problem, name).extend(tensors)
    eager = problem.to(device)
    graphed = eager.to(device)
    for each in (eager, graphed):
        each.step()
    # Other gradients than those of the steps so far, as a captured backward pass has them.
    graphed.grads = [grad.clone() for grad in graphed.grads]
    captured = Captured(device, graphed.step)
    for _ in range(3):
        eager.new_gradients()
        copy_gradients(eager, graphed)
        captured.replay()
        eager.step()
    assert differing(graphed, eager) == []


def refused(device: str, message: str, run) -> None:
    """A capture that ends with an error, after which the device is as usable as before."""
    scratch = torch.zeros(4, device=device)

    def with_something_to_capture() -> None:
        scratch.add_(1)  # an empty graph would be warned of
        run()

    with pytest.raises(RuntimeError, match=message):
        Captured(device, with_something_to_capture)
    torch.cuda.synchronize()


@needs_cuda
def test_triton_captures_only_steps_that_it_knows(device):
    with gk.use_backend("triton"):
        problem = one_of_each(torch.float32).to(device)
        before = problem.to(device)
        message = r"masked_adam_ is being captured in a CUDA graph, but none like it"
        refused(device, message, problem.step)
        problem.step()
        before.step()
        problem.exp_avgs[0] = problem.exp_avgs[0].clone()
        refused(device, message, problem.step)
        assert differing(problem, before) == []
        problem.step()
        captured = Captured(device, problem.step)
        for _ in range(2):
            captured.replay()
        for _ in range(3):
            before.step()
        assert differing(problem, before) == []


@needs_cuda
def test_a_first_step_is_captured_by_one_backend_and_refused_by_the_other(device):
    x, new = matrices(device, 2)
    run, cols = OPERATORS["topk_masked_adam_"], columns(device)
    with gk.use_backend("cuda"):
        expected = run(new, cols)
        captured = Captured(device, lambda: run(x, cols))
        x.copy_(new)
        captured.replay()
        assert same(captured.result, expected)
    with gk.use_backend("triton"):
        refused(device, r"topk_masked_adam_ cannot be captured", lambda: run(x, cols))


def test_other_tables_do_not_take_a_graphs_memory(kernels, device):
    """Steps with gradients in new places after the capture, whose tables replace each other."""
    eager = one_of_each(torch.float32).to(device)
    graphed = eager.to(device)
    for each in (eager, graphed):
        each.step()
    captured, kept = Captured(device, graphed.step), graphed.grads
    for _ in range(8):
        graphed.grads = [grad.clone() for grad in graphed.grads]
        for each in (eager, graphed):
            each.step()
    graphed.grads = kept
    captured.replay()
    eager.step()
    assert differing(graphed, eager) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_replays_read_rates(kernels, device, dtype):
    eager = one_of_each(dtype).to(device)
    graphed = eager.to(device)
    rates = torch.tensor([0.01, 0.9, 0.999], dtype=torch.float64, device=device)
    options = {"weight_decay": 0.1, "decoupled_weight_decay": True, "anchor": 0.1, "anchor_decoupled": True}
    eager.step(**options)
    graphed.step(rates=rates, **options)
    captured = Captured(device, lambda: graphed.step(rates=rates, **options))
    for lr, beta1, beta2 in ((0.01, 0.9, 0.999), (0.1, 0.3, 0.9), (0.0, 0.0, 0.5)):
        eager.new_gradients()
        copy_gradients(eager, graphed)
        rates.copy_(torch.tensor([lr, beta1, beta2], dtype=torch.float64))
        captured.replay()
        eager.step(lr=lr, beta1=beta1, beta2=beta2, **options)
        assert differing(graphed, eager) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_captured_training_step_trains(kernels, device, dtype):
    inputs = [torch.randn(20, 32, dtype=dtype).to(device) for _ in range(8)]
    eager, optimizer, _ = small(device, dtype, **CAPTURABLE)
    expected = [step(eager, optimizer, x).item() for x in inputs]

    model, optimizer, check = small(device, dtype, **CAPTURABLE)
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


def test_a_captured_optimizer_can_be_copied_and_goes_on(kernels, device):
    """What a graph has stepped is state like any other: an eager step goes on from it."""
    model, optimizer, check = small(device, torch.float64, **CAPTURABLE)
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


def test_replays_of_a_training_step_follow_a_schedule(kernels, device):
    """A learning rate in a tensor on the device, which torch's schedulers write in place."""
    inputs = [torch.randn(20, 32, dtype=torch.float64).to(device) for _ in range(6)]

    def scheduled():
        model, optimizer, check = small(device, torch.float64, **CAPTURABLE)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64, device=device)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), check

    eager, optimizer, schedule, _ = scheduled()
    for x in inputs:
        step(eager, optimizer, x)
        schedule.step()
    model, optimizer, schedule, check = scheduled()
    x = inputs[0].clone()
    wait(device)
    with on(new_stream(device)):
        for given in inputs[:2]:
            x.copy_(given)
            step(model, optimizer, x)
            schedule.step()
    wait(device)
    captured = Captured(device, lambda: step(model, optimizer, x))
    for given in inputs[2:]:
        x.copy_(given)
        captured.replay()
        schedule.step()
    close(model, eager, 1e-8)
    check()
