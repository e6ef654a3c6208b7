"""torch.compile(optimizer.step): the bits of an eager step, one graph, and no second one in many steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import gradsel
from tests.cuda.build import compiler
from tests.gradsel.optim.cases import random_masks
from tests.kernels.cases import INTERPRETED, same_bits
from tests.support.toy import Toy

pytestmark = pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not mix")


class Pair:
    """A model whose optimizer's step is compiled, and the same with an eager step."""

    def __init__(
        self, dtype=torch.float32, attached=False, channels_last=False, lr=0.1, backend="aot_eager", **options
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(20, 4)).to(dtype)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        selection = random_masks(model, 0)
        self.models = [model, copy.deepcopy(model)]
        self.optimizers = [self._optimizer(each, selection, attached, lr, options) for each in self.models]
        torch._dynamo.reset()
        counters.clear()
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(self.optimizers[0].step, fullgraph=True, backend=self.counter)

    @staticmethod
    def _optimizer(model, selection, attached, lr, options):
        if attached:
            gradsel.attach(model, selection)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.1, "maximize": True}]
        lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
        return gradsel.MaskedAdam(groups, lr, masks=None if attached else selection, **options)

    def step(self, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        for first, second in zip(*(model.parameters() for model in self.models), strict=True):
            if first.requires_grad:
                first.grad = torch.randn(first.shape, generator=generator).to(first.dtype)
                second.grad = first.grad.clone()
        self.compiled()
        self.optimizers[1].step()

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def assert_equal(self) -> None:
        first, second = (model.state_dict() for model in self.models)
        assert all(same_bits(first[name], second[name]) for name in second)
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        assert states[0].keys() == states[1].keys()
        for i, state in states[1].items():
            assert state.keys() == states[0][i].keys()
            for key, kept in state.items():
                assert (
                    same_bits(states[0][i][key], kept) if isinstance(kept, torch.Tensor) else kept == states[0][i][key]
                )
        assert not counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attached": True},
        {"attached": True, "dtype": torch.bfloat16, "anchor": 0.1, "amsgrad": True},
        {"channels_last": True, "decoupled_weight_decay": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "low_precision": "kahan", "anchor": 0.1},
        {"dtype": torch.float16, "low_precision": "stochastic", "state_dtype": torch.bfloat16, "betas": (0.9, 0.99)},
    ],
    ids=str,
)
def test_ten_learning_rates_compile_twice(options):
    """The second time for numbers that change; torch.optim.Adam compiles as often."""
    pair = Pair(**options)
    for t in range(10):
        for group in pair.groups():
            group["lr"] = 0.1 / (t + 1)
        pair.step(t)
    pair.assert_equal()
    assert pair.counter.frame_count == 2


def test_a_learning_rate_in_a_tensor_compiles_once():
    pair = Pair(lr=torch.tensor(0.1))
    for t in range(10):
        for group in pair.groups():
            group["lr"].fill_(0.1 / (t + 1))
        pair.step(t)
    pair.assert_equal()
    assert pair.counter.frame_count == 1


def test_eager_and_compiled_steps_take_turns():
    pair = Pair(dtype=torch.bfloat16, attached=True)
    for t in range(6):
        pair.step(t)
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.assert_equal()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_masters_take_over_what_is_written_in_between(backend):
    """Inductor would compare masters with weights before rounding them."""
    if backend == "inductor" and compiler() is None:
        pytest.skip("inductor needs a C++ compiler")
    pair = Pair(dtype=torch.bfloat16, backend=backend)
    for t in range(4):
        pair.step(t)
        for model in pair.models:
            with torch.no_grad():
                model[2].weight.mul_(0.5)
    pair.assert_equal()
    assert pair.counter.frame_count == 1


@pytest.mark.parametrize("change", ["load", "reselect", "anchor", "no gradient"])
def test_what_changes_between_steps_is_noticed(change):
    pair = Pair()
    pair.step(0)
    kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    alive = [(list(optimizer.state.values()), optimizer.selection) for optimizer in pair.optimizers]
    pair.step(1)
    for model, optimizer, state in zip(pair.models, pair.optimizers, kept, strict=True):
        if change == "load":
            optimizer.load_state_dict(state)
        elif change == "reselect":
            optimizer.reselect(random_masks(model, 1))
        elif change == "anchor":
            optimizer.param_groups[0]["anchor"] = 0.5
    pair.step(2)
    if change == "anchor":
        for value in (0.0, 0.25, 0.0, 0.5):
            for group in pair.groups():
                group["anchor"] = value
            pair.step(3)
    if change == "no gradient":
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["params"][0].grad = None
        pair.compiled()
        pair.optimizers[1].step()
    pair.assert_equal()
    assert alive  # so that nothing can be noticed by a tensor's death


def test_the_step_that_selects_is_eager():
    """It breaks the graph; those after it do not."""
    model = Toy()
    models = [model, copy.deepcopy(model)]
    optimizers = [gradsel.MaskedAdam(m.named_parameters(), policy=gradsel.PerNeuron(1)) for m in models]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    torch._dynamo.reset()
    torch.compile(optimizers[0].step, backend="aot_eager")()
    optimizers[1].step()
    torch.compile(optimizers[0].step, backend="aot_eager", fullgraph=True)()
    optimizers[1].step()
    assert all(map(same_bits, *([p.detach() for p in model.parameters()] for model in models)))


def test_bad_anchors_are_refused():
    pair = Pair()
    pair.step(0)
    pair.optimizers[0].param_groups[0]["anchor"] = -1.0
    with pytest.raises(Exception, match="Invalid anchor value"):
        pair.compiled()


def test_numbers_are_checked():
    from gradsel_kernels import masked_adam_

    tensors = [[torch.zeros(2)] for _ in range(4)] + [[torch.zeros(())]]
    with pytest.raises(ValueError, match=r"numbers must be 6 float64 on the CPU \(lr, .*anchor\), got torch.float32"):
        masked_adam_(*tensors, lr=0.1, numbers=torch.zeros(6))
    masked_adam_(*tensors, lr=0.1, numbers=torch.tensor([0.5, 0.9, 0.999, 1e-8, 0.0, 0.0], dtype=torch.float64))
    assert tensors[4][0].item() == 1
