"""What the cuda backend does beside its kernels: saying why it is off, and keeping tables on the device."""

from __future__ import annotations

import os

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import reference
from gradsel_kernels.backends import backend
from tests.kernels import cases

emulated_only = pytest.mark.skipif(
    os.environ.get("GRADSEL_EMULATE_CUDA") != "1", reason="runs in the process that test_emulated.py starts"
)


@pytest.mark.skipif(os.environ.get("GRADSEL_EMULATE_CUDA") == "1", reason="here it runs on CPU tensors")
def test_cpu_tensors_are_refused():
    with gk.use_backend("cuda"), pytest.raises(RuntimeError, match="CUDA tensors"):
        gk.topk_rows(torch.ones(2, 3), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(os.environ.get("GRADSEL_EMULATE_CUDA") == "1", reason="there is an emulated one")
def test_without_a_device_it_says_what_is_missing():
    reason = backend("cuda").why_off(torch.device("cuda"))
    assert "torch finds no CUDA device" in reason or "nvcc" in reason
    assert f"off: {reason}" in gk.backends.config()


class Tensors:
    """Small tensors, each with a column a row, and their gradients."""

    def __init__(self, count: int) -> None:
        self.weights = [torch.randn(3, 5) for _ in range(count)]
        self.cols = [cases.random_cols(3, 5, 2) for _ in range(count)]
        self.moments = [[torch.zeros(3, 2) for _ in range(count)] for _ in range(2)]
        self.steps = [torch.zeros(()) for _ in range(count)]

    def step(self, grads: list[torch.Tensor]) -> None:
        layouts = [gk.Layout.COLS] * len(grads)
        gk.masked_adam_(self.weights, grads, *self.moments, self.steps, lr=0.1, indices=self.cols, layouts=layouts)


@pytest.fixture
def writes(emulated, monkeypatch):
    """How many tables are written to the device."""
    return counted(emulated, monkeypatch, "cuda_write_table")


def counted(emulated, monkeypatch, function: str) -> list:
    """The first argument of every call of a function of the emulated device."""
    done = []

    class Counting:
        def __getattr__(self, name):
            return getattr(emulated, name)

    def count(first, *args):
        done.append(first)
        return getattr(emulated, function)(first, *args)

    setattr(Counting, function, staticmethod(count))
    monkeypatch.setattr(backend("cuda"), "_C", Counting())
    return done


@emulated_only
@pytest.mark.parametrize("count", [1, 150, 400])
def test_any_number_of_tensors_in_one_table(fast, count):
    """A kernel's parameters hold 4,000 numbers of a table, 142 tensors; the rest follows."""
    ours = Tensors(count)
    torch.manual_seed(1)
    grads = [torch.randn(3, 5) for _ in range(count)]
    expected = [weight.clone() for weight in ours.weights]
    for weight, grad, cols in zip(expected, grads, ours.cols, strict=True):
        moment, other, step = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(())
        with gk.use_backend("reference"):
            gk.masked_adam_(
                [weight], [grad], [moment], [other], [step], lr=0.1, indices=[cols], layouts=[gk.Layout.COLS]
            )
    ours.step(grads)
    for found, right in zip(ours.weights, expected, strict=True):
        torch.testing.assert_close(found, right)
    assert all(step.item() == 1 for step in ours.steps)


@emulated_only
def test_a_table_is_written_when_an_address_is_new(fast, writes):
    ours = Tensors(3)
    sets = [[torch.randn(3, 5) for _ in range(3)] for _ in range(6)]
    for grads in (sets[0], sets[0], sets[1], sets[0], sets[1]):
        ours.step(grads)
    assert len(writes) == 2
    for grads in sets:
        ours.step(grads)
    assert len(writes) == 6
    ours.step(sets[0])  # forgotten by now: four are kept
    assert len(writes) == 7
    assert ours.steps[0].item() == 12


@emulated_only
def test_a_step_that_overflowed_is_not_counted_and_the_next_one_is(fast):
    ours, grads = Tensors(2), [torch.randn(3, 5) for _ in range(2)]
    before = [weight.clone() for weight in ours.weights]
    layouts = [gk.Layout.COLS] * 2
    for found, steps in ((1.0, 0), (0.0, 1), (2.0, 1), (0.0, 2)):
        gk.masked_adam_(
            ours.weights, grads, *ours.moments, ours.steps, lr=0.1, indices=ours.cols, layouts=layouts,
            found_inf=torch.tensor(found),
        )  # fmt: skip
        assert [step.item() for step in ours.steps] == [steps] * 2
        assert all(torch.equal(a, b) for a, b in zip(ours.weights, before, strict=True)) == (steps == 0)


@emulated_only
def test_the_first_step_of_a_model_is_one_launch(fast, emulated, monkeypatch):
    """One more for each size of the gradients' elements, and for K = 1 and K above 64, which are searched otherwise."""
    launches = counted(emulated, monkeypatch, "cuda_topk_adam")
    weights = [torch.randn(3 + i % 4, 66 + i % 50) for i in range(300)]
    gk.topk_masked_adam_(weights, [weight.cos() for weight in weights], 2, lr=0.1)
    assert launches == ["gradsel_topk_adam_few_32"]
    launches.clear()
    weights += [weight.half() for weight in weights[:2]]
    gk.topk_masked_adam_(weights, [weight.cos() for weight in weights], [1, 65, *[2] * 300], lr=0.1)
    assert launches == [f"gradsel_topk_adam_{name}" for name in ("few_16", "few_32", "many_32", "one_32")]


@emulated_only
@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_a_first_step_does_not_depend_on_how_many_warps_share_a_row(fast, emulated, multiprocessors, k):
    """Short and long rows in one launch, of which each has its own number of warps."""
    grads = [torch.randint(-9, 9, shape).float() for shape in ((3, 90), (2, 5000), (0, 7), (5, 2100))]
    results = []
    for count in (3, multiprocessors):
        emulated.set_multiprocessors(count)
        try:
            weights = [torch.ones(grad.shape) for grad in grads]
            first = gk.topk_masked_adam_(weights, grads, k, lr=0.1, amsgrad=True, originals=True)
        finally:
            emulated.set_multiprocessors(3)
        results.append([*weights, *(tensor for made in first if made[0] is not None for tensor in made)])
    assert all(map(torch.equal, *results))
    for grad, cols in zip(grads, first.cols, strict=True):
        assert torch.equal(cols, reference.topk_rows(grad, cols.shape[1]))


@emulated_only
@pytest.mark.parametrize("multiprocessors", [1, 2, 200])
def test_any_number_of_blocks_does_the_same(fast, emulated, multiprocessors):
    """Blocks take runs of tiles, and warps share rows, as many as the device is wide."""
    weights = [torch.randn(700, 40), torch.randn(13, 9), torch.zeros(0, 5), torch.randn(300, 64)]
    cols = [cases.random_cols(*weight.shape, 3) for weight in weights]
    results = []
    for count in (3, multiprocessors):
        emulated.set_multiprocessors(count)
        try:
            trained = [weight.clone() for weight in weights]
            moments = [[torch.zeros(c.shape) for c in cols] for _ in range(2)]
            gk.masked_adam_(
                trained, [weight.cos() for weight in weights], *moments, [torch.zeros(()) for _ in cols], lr=0.1,
                indices=cols, layouts=[gk.Layout.COLS] * len(cols),
            )  # fmt: skip
            grad = torch.arange(3 * 9000).remainder(1009).float().view(3, 9000)
            results.append([*trained, *gk.topk_rows_bits(grad, 5), gk.topk_rows(grad, 1)])
            assert torch.equal(results[-1][-1], reference.topk_rows(grad, 1))
        finally:
            emulated.set_multiprocessors(3)
    assert all(map(torch.equal, *results))
