"""What a CUDA graph needs of masked_adam_: tables that are made once, and rates that kernels read.

A capture is pretended here: the stream says that it is being captured, and nothing may come from host memory. What
graphs really do is for tests/gpu/test_graphs.py.
"""

from __future__ import annotations

import gc

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.gpu import copy_gradients, differing, one_of_each
from tests.kernels import cases

interpreted = pytest.mark.skipif(not cases.INTERPRETED, reason="about Triton's tables, which its interpreter runs on")
OPTIONS = {"weight_decay": 0.1, "amsgrad": True}


@pytest.fixture
def uploads(monkeypatch):
    """The tensors that are copied to the device."""
    from gradsel_kernels.triton import device_tables

    done = []

    def count(numbers, device):
        done.append(numbers)
        return numbers.clone()

    monkeypatch.setattr(device_tables, "to_device", count)
    return done


@pytest.fixture
def capturing(monkeypatch):
    """Called with a function, runs it as if it were captured."""
    from gradsel_kernels.triton import device_tables, topk_adam

    def run(function):
        def forbidden(numbers, device):
            raise AssertionError("a copy from the host is captured")

        with monkeypatch.context() as patch:
            patch.setattr(device_tables, "is_capturing", lambda device: True)
            patch.setattr(device_tables, "to_device", forbidden)
            patch.setattr(topk_adam, "to_device", forbidden)
            function()

    return run


@interpreted
def test_only_a_first_step_copies_a_table(fast, uploads):
    problem = one_of_each(torch.float32, shape=(8, 20))
    problem.step(**OPTIONS)
    first = len(uploads)
    assert first > 0
    for _ in range(3):
        problem.new_gradients()
        problem.step(lr=0.5, **OPTIONS)
    assert len(uploads) == first
    problem.step(weight_decay=0.3, amsgrad=True)
    assert len(uploads) == first, "numbers are no part of a table"


def moved(problem) -> None:
    problem.exp_avgs[1].data = problem.exp_avgs[1].clone()


def replaced(problem) -> None:
    problem.exp_avg_sqs[0] = problem.exp_avg_sqs[0].clone()


def freed(problem) -> None:
    """The allocator may give the new tensor the old one's memory, and Python its identity."""
    shape = problem.exp_avg_sqs[0].shape
    problem.exp_avg_sqs[0] = torch.zeros(0)
    gc.collect()
    problem.exp_avg_sqs[0] = torch.zeros(shape)


def aliased(problem) -> None:
    """Another tensor in the same memory, whose rows are its columns."""
    weight = problem.weights[1]
    problem.weights[1] = weight.view(-1).as_strided(weight.shape, (1, weight.shape[0]))


def recast(problem) -> None:
    problem.indices[2] = problem.indices[2].to(torch.int64)


@interpreted
@pytest.mark.parametrize("change", [moved, replaced, freed, aliased, recast])
def test_other_tensors_make_another_table(fast, uploads, capturing, change):
    problem = one_of_each(torch.float32, shape=(8, 20))
    problem.step(**OPTIONS)
    change(problem)
    expected = problem.to("cpu")
    expected.weights[1] = problem.weights[1].clone(memory_format=torch.preserve_format)
    with pytest.raises(RuntimeError, match="its tensors, other than the gradients, or its options have changed"):
        capturing(lambda: problem.step(**OPTIONS))
    assert differing(problem, expected) == []
    before = len(uploads)
    problem.step(**OPTIONS)
    assert len(uploads) > before or change is freed
    with gk.use_backend("reference"):
        expected.step(**OPTIONS)
    for mine, theirs in zip(problem.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs)


@interpreted
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"weight_decay": 0.1, "amsgrad": False}], ids=str)
def test_other_options_are_not_captured(fast, capturing, options):
    """They would be compiled, which a capture does not allow."""
    problem = one_of_each(torch.float32, shape=(8, 20))
    problem.step(**OPTIONS)
    with pytest.raises(RuntimeError, match="Make a step with the same tensors and options outside of the graph"):
        capturing(lambda: problem.step(**options))
    with pytest.raises(RuntimeError, match="none like it has been made before"):
        capturing(problem.to("cpu").step)


@interpreted
def test_a_captured_step_has_the_bits_of_others(fast, capturing):
    """With the same gradients, with gradients elsewhere, and then again outside of the graph."""
    problem = one_of_each(torch.float32, shape=(8, 20))
    expected = problem.to("cpu")
    kept = []
    for captured in (False, True, False, True):
        kept.append(problem.grads)
        if captured:
            problem.grads = [grad.clone() for grad in problem.grads]
        problem.new_gradients()
        copy_gradients(problem, expected)
        if captured:
            capturing(lambda: problem.step(**OPTIONS))
        else:
            problem.step(**OPTIONS)
        expected.step(**OPTIONS)
        assert differing(problem, expected) == []


@interpreted
@pytest.mark.parametrize("count", [1, 32, 70])
def test_new_addresses_of_gradients_are_parameters_of_a_kernel(count):
    from gradsel_kernels.triton import device_tables

    lines = torch.arange(count * device_tables.LINE).view(count, -1)
    addresses = [2**62 - i for i in range(count)]
    expected = lines.clone()
    expected[:, device_tables._GRAD] = torch.tensor(addresses)
    before = lines.clone()
    assert torch.equal(device_tables._with_addresses(lines, addresses), expected)
    assert torch.equal(lines, before)


@interpreted
def test_what_a_graph_reads_lives_as_long_as_its_tensors(fast, capturing):
    """However many other tables are made by then."""
    from gradsel_kernels.triton import device_tables

    problem = one_of_each(torch.float32, (Layout.COLS,), shape=(8, 20))
    problem.step()
    before = len(device_tables._captured)
    capturing(problem.step)
    for _ in range(5):
        problem.grads = [grad.clone() for grad in problem.grads]
        problem.step()
    assert len(device_tables._captured) == before + 1
    del problem
    gc.collect()
    assert len(device_tables._captured) == before


@interpreted
def test_a_first_step_is_not_captured(fast, capturing):
    weight = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="topk_masked_adam_ cannot be captured in a CUDA graph"):
        capturing(lambda: gk.topk_masked_adam_([weight], [torch.ones(3, 4)], 1, lr=0.1))
    assert torch.equal(weight, torch.ones(3, 4))


# --- Rates -------------------------------------------------------------------------------------------------------

HYPERPARAMETERS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"anchor": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 5.0, "anchor_l1": True, "anchor_decoupled": True},
    {"anchor": 5.0, "anchor_decoupled": True},
]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((torch.float64, options) for options in HYPERPARAMETERS),
        (torch.float32, HYPERPARAMETERS[2]),
        (torch.bfloat16, HYPERPARAMETERS[3]),
    ],
    ids=str,
)
def test_rates_in_a_tensor_are_those_in_numbers(fast, dtype, options):
    """To the bit; and they are read in every step."""
    problem = one_of_each(dtype, (Layout.COLS,), shape=(8, 20)).round("stochastic").to(fast)
    expected = problem.to(fast)
    rates = torch.empty(3, dtype=torch.float64, device=fast)
    for lr, beta1, beta2 in ((0.1, 0.9, 0.99), (0.01, 0.3, 0.9)):
        rates.copy_(torch.tensor([lr, beta1, beta2], dtype=torch.float64))
        problem.step(lr=7.0, beta1=0.5, beta2=0.5, rates=rates, **options)
        expected.step(lr=lr, beta1=beta1, beta2=beta2, **options)
        assert differing(problem, expected) == []


@pytest.mark.parametrize(
    "rates",
    [torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(6, dtype=torch.float64)[::2]],
    ids=["2", "float32", "strided"],
)
def test_rates_of_another_form_are_refused(fast, rates):
    problem = one_of_each(torch.float32, shape=(8, 20)).to(fast)
    expected = problem.to(fast)
    with pytest.raises(ValueError, match=r"rates must be contiguous float64 \[3\] on .* \(lr, beta1, beta2\), got"):
        problem.step(rates=rates.to(fast))
    assert differing(problem, expected) == []
